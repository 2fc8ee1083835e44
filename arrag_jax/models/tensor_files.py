"""Finds the tensors in the files of a checkpoint folder, reads them one after another, and writes safetensors files.

Weights may be safetensors in one or several files, ``pytorch_model.bin`` in one or several files, or published ``.pt``
files. A LoRA adapter is in a file of its own. PyTorch's formats need PyTorch, which loads weights only, so that no code
in a file is run.
"""

import argparse
import dataclasses
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from arrag_jax.checksums import checksum
from arrag_jax.errors import UserError
from arrag_jax.json_files import parse_json, read_json, require_no_pointer
from arrag_jax.models.layouts import plain_key
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.schema import WeightsIndex
from arrag_jax.parsing import parse

CHECKSUMS = "checksums"  # key in the metadata of our files; its value is JSON, tensor name → checksum
ADAPTER = "adapter_model"  # the PEFT library's name
WRAPPERS = ("model", "module", "state_dict")  # keys under which training code saves the weights
# Pages read from a mapped file count as memory of this process, so files are closed after this many bytes.
OPEN_BYTES = 32 * 2**20

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
      file: the file that holds it.
      name: its name in the file.
      shape: as stored, in PyTorch's order of axes.
      dtype: numpy's name of its dtype; "bfloat16" is the dtype of ml_dtypes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class _Safetensors:
    """A safetensors file. The safetensors library checks that it is complete.

    Tensors are read without the library's memory map: an array that refers to a map keeps all touched pages in memory.
    """

    def __init__(self, path: Path):
        self.path = path
        _require_file(path)
        try:
            safe_open(path, "numpy")
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._entries = parse_json(file.read(size), str(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy the checkpoint again") from error
        metadata = self._entries.pop("__metadata__", {})
        self._sums = parse_json(metadata.get(CHECKSUMS, "{}"), f"{path}: its {CHECKSUMS}")
        if not isinstance(self._sums, dict):
            raise UserError(f"{path} is damaged: its {CHECKSUMS} are no object; copy the checkpoint again")
        self._start = 8 + size
        self.has_checksums = bool(self._sums)

    def tensors(self) -> list[Stored]:
        for name, entry in self._entries.items():
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{name} in {self.path} has dtype {entry['dtype']}, which is not supported")
        return [
            Stored(self.path, name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in self._entries.items()
        ]

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype, shape = jnp.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        offset = self._start + entry["data_offsets"][0]
        return np.fromfile(self.path, dtype, math.prod(shape), offset=offset).reshape(shape)

    def check(self, name: str, value: np.ndarray) -> None:
        """Raises UserError if a tensor does not match its checksum; files that are not ours have no checksums."""
        if self._sums and self._sums.get(name) != checksum(value):
            raise UserError(f"{self.path} is damaged: {name} is not what was written; copy the checkpoint again")


class _TorchFile:
    """An open file of ``torch.save``, mapped into memory."""

    def __init__(self, path: Path):
        self.path = path
        _require_file(path)
        try:
            import torch  # imported here only, because everything else runs without it
        except ImportError as error:
            raise UserError(
                f"{path} can be read with PyTorch only, which is not installed: pip install torch, or convert the "
                "checkpoint once where it is (python -m arrag_jax.convert --source … --target …)"
            ) from error
        try:  # files of PyTorch before 1.6 are no zips, and cannot be mapped
            with torch.serialization.safe_globals([argparse.Namespace]):  # the class of saved training settings
                self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch raises many types for the same cause
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path} is not a whole PyTorch file of weights alone ({reason}); copy the checkpoint again"
            ) from error
        for key in WRAPPERS:
            if isinstance(self._tensors, dict) and isinstance(self._tensors.get(key), dict):
                self._tensors = self._tensors[key]
                break
        if not isinstance(self._tensors, dict) or not all(isinstance(t, torch.Tensor) for t in self._tensors.values()):
            raise UserError(f"{path} holds more than named tensors; give the folder of a model's checkpoint")
        for name, tensor in self._tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES.values() or tensor.layout != torch.strided:
                raise UserError(f"{name} in {path} has dtype {dtype} ({tensor.layout}), which is not supported")
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise UserError(f"{name} in {path} has fewer numbers than its shape {tuple(tensor.shape)} needs")
        self._int16 = torch.int16

    def tensors(self) -> list[Stored]:
        return [
            Stored(self.path, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach()  # the tensor may be a torch.nn.Parameter
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":  # numpy itself has no bfloat16
            tensor = tensor.view(self._int16)
        return np.array(tensor.numpy(), order="C").view(jnp.dtype(dtype))  # a copy, because the file will be closed

    def check(self, name: str, value: np.ndarray) -> None:
        """Does nothing, because PyTorch's files have no checksums."""


def stored_tensors(directory: Path, also: tuple[str, ...] = ()) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint folder, including those of a LoRA adapter, by plain key.

    Args:
      also: names or patterns of further files to read; files that do not exist are ignored.

    Raises:
      UserError: if there are no weights, a file is truncated, an index does not match, or a tensor is there twice.
    """
    directory = checkpoint_folder(directory)
    names = (f"{ADAPTER}.safetensors", f"{ADAPTER}.bin", *also)
    beside = [path for name in names for path in sorted(directory.glob(name)) if path.is_file()]
    further = [tensor for path in beside for tensor in open_file(path).tensors()]
    stored: dict[str, Stored] = {}
    for tensor in (*_weights(directory, beside), *further):
        key = plain_key(tensor.name)
        if key in stored:
            places = f"{stored[key].file.name} and {tensor.file.name}"
            raise UserError(f"{directory} holds {key} twice, in {places}; copy the checkpoint again")
        stored[key] = tensor
    return stored


def has_checksums(path: Path) -> bool:
    """Returns whether a file of weights holds checksums of its tensors."""
    return path.suffix == ".safetensors" and path.is_file() and _Safetensors(path).has_checksums


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor's key and values, in the mapping's order, with one tensor in memory at a time.

    While the caller works on a tensor, another thread verifies its checksum, if the file has one.

    Raises:
      UserError: if a tensor does not match its checksum; raised at the latest when the next tensor is requested.
    """
    opened: dict[Path, _Safetensors | _TorchFile] = {}
    taken = 0
    with ThreadPoolExecutor(1) as beside:
        for key, tensor in stored.items():
            if taken > OPEN_BYTES:
                opened.clear()
                taken = 0
            if tensor.file not in opened:
                opened[tensor.file] = open_file(tensor.file)
            taken += tensor.nbytes
            file = opened[tensor.file]
            value = file.read(tensor.name)
            checked = beside.submit(file.check, tensor.name, value)
            yield key, value
            checked.result()
            del value  # before the next one is read


def _weights(directory: Path, beside: list[Path]) -> list[Stored]:
    """Returns the tensors of the model's weights, from an index or a single file.

    Safetensors files come before PyTorch's ``.bin``; ``.pt`` files come last.

    Args:
      beside: files with other tensors, which are not read here. A folder may hold only these.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _indexed(index)
        if (directory / single).is_file():
            return open_file(directory / single).tensors()
    shards = sorted(path.name for kind in ("safetensors", "bin") for path in directory.glob(f"*-of-*.{kind}"))
    if shards:
        single = "model.safetensors" if shards[0].endswith(".safetensors") else "pytorch_model.bin"
        raise UserError(
            f"{directory} holds {shards[0]} but not {single}.index.json, which tells what lies where; copy it too"
        )
    published = [path for path in sorted(directory.glob("*.pt")) if path not in beside]
    if published or beside:
        return [tensor for path in published for tensor in open_file(path).tensors()]
    raise UserError(
        f"{directory} holds no model.safetensors, no pytorch_model.bin and no .pt; give a checkpoint's folder"
    )


def _indexed(index: Path) -> list[Stored]:
    """Returns the tensors of the files that an index names; files and index must agree."""
    try:
        listed = parse(WeightsIndex, read_json(index), index.name, ignore_unknown=True).weight_map
    except UserError as error:
        raise UserError(f"{index} is no index of weights ({error}); copy the checkpoint again") from error
    absent = sorted(name for name in set(listed.values()) if not (index.parent / name).is_file())
    if absent:
        raise UserError(f"{index.parent / absent[0]} is named by its index but is not there; copy the checkpoint again")
    tensors = [t for name in sorted(set(listed.values())) for t in open_file(index.parent / name).tensors()]
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    absent = sorted(key for key, name in listed.items() if (key, name) not in held)
    if absent:
        raise UserError(f"{index} names tensors that its files do not hold: {some(absent)}; copy the checkpoint again")
    omitted = sorted({key for key, _ in held} - listed.keys())
    if omitted:
        raise UserError(f"{index} omits tensors that its files hold: {some(omitted)}; copy the checkpoint again")
    return tensors


def open_file(path: Path) -> _Safetensors | _TorchFile:
    """Returns a file of weights, opened; raises UserError if it is not whole."""
    return _Safetensors(path) if path.suffix == ".safetensors" else _TorchFile(path)


def _require_file(path: Path) -> None:
    """Raises UserError if a file of weights cannot be read, or is a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            require_no_pointer(file.read(64), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def some(items: list[str], limit: int = 12) -> str:
    """Returns a text with the first items and the number of the remaining ones, for messages."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file with a checksum of every tensor, which ``read_tensors`` verifies.

    The file has the permissions of a new file, because the library makes files that only their owner can read.
    """
    path.touch()
    mode = path.stat().st_mode
    sums = {name: checksum(value) for name, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", CHECKSUMS: json.dumps(sums)})
    _order_metadata(path)
    path.chmod(mode)


def _order_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, because the library writes them in a different order every time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # padded with spaces, which the format allows
            file.seek(8)
            file.write(text.ljust(size))
