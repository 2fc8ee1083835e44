"""Files of tensors in a checkpoint folder: which tensor lies in which file; read one after another.

Safetensors in one file or several, ``pytorch_model.bin`` in one or several (PyTorch then has to be installed, and
loads weights only, so that no code in the file is run), and a LoRA adapter in a file of its own beside them.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from arrag_jax.errors import UserError
from arrag_jax.fields import local_path
from arrag_jax.models.layouts import plain_key

PACKAGE = Path(__file__).resolve().parents[1]
ADAPTER = "adapter_model"  # the PEFT library's name
# What has been read of a mapped file counts as this process's memory, so files are closed after so many bytes.
OPEN_BYTES = 32 * 2**20

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
      file: that holds it.
      name: under which it stands there.
      shape: as stored, in PyTorch's order of axes.
      dtype: numpy's name of it; "bfloat16" is that of ml_dtypes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class _Safetensors:
    """A safetensors file. The library checks that it is whole; the bytes are read plainly, for what its map has
    touched stays in memory with every array that looks into it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            safe_open(path, "numpy")
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._entries = json.loads(file.read(size))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy the checkpoint again") from error
        self._entries.pop("__metadata__", None)
        self._start = 8 + size

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


class _TorchFile:
    """An open file of ``torch.save``, mapped into memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch  # here alone: everything else runs without it
        except ImportError as error:
            raise UserError(
                f"{path} can be read with PyTorch only, which is not installed: pip install torch, or convert the "
                "checkpoint once where it is (python -m arrag_jax.convert --source … --target …)"
            ) from error
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for one cause
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path} is not a whole PyTorch file of weights alone ({reason}); copy the checkpoint again"
            ) from error
        if not isinstance(self._tensors, dict) or not all(isinstance(t, torch.Tensor) for t in self._tensors.values()):
            raise UserError(f"{path} holds other things than tensors by name; give the folder of a Janus checkpoint")
        self._int16 = torch.int16

    def tensors(self) -> list[Stored]:
        return [
            Stored(self.path, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach()  # it may be a torch.nn.Parameter
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16":  # numpy has no such type of its own
            tensor = tensor.view(self._int16)
        return np.array(tensor.numpy(), order="C").view(jnp.dtype(dtype))  # a copy, for the file will be closed


def is_run(directory: Path) -> bool:
    """Is it the --workdir of a training run? A folder of weights may well hold one named ``checkpoints``."""
    return (directory / "checkpoints").is_dir() and (directory / "base.json").is_file()


def wherever(directory: Path) -> Path:
    """The folder as it is named, or where nothing is there and it is named so, the one inside this package.

    So "arrag_jax/assets/emoji_janus", as the shipped configs have it, holds from any working directory.
    """
    inside = PACKAGE.parent / directory
    return inside if directory.parts[:1] == (PACKAGE.name,) and not directory.exists() else directory


def checkpoint_folder(directory: Path) -> Path:
    """The folder itself (``wherever`` it is, ``~`` expanded), or the export in it where it is that of a training run.

    Raises:
      UserError: an address, or a run that has no export yet.
    """
    directory = wherever(Path(local_path(directory, "checkpoint")))
    if not is_run(directory):
        return directory
    if not (directory / "export" / "config.json").is_file():
        raise UserError(
            f"{directory} is a training run without an export yet; let it finish, or make one of its best checkpoint: "
            f"python -m arrag_jax.convert --source {directory} --target DIR"
        )
    return directory / "export"


def stored_tensors(directory: Path, also: tuple[str, ...] = ()) -> dict[str, Stored]:
    """The tensors of a checkpoint folder, its LoRA adapter's among them, by plain key.

    Args:
      also: further files to look into, where they are there.

    Raises:
      UserError: no weights, a truncated file, an index that does not match its files, or a tensor that is there twice.
    """
    directory = checkpoint_folder(directory)
    beside = [directory / name for name in (f"{ADAPTER}.safetensors", f"{ADAPTER}.bin", *also)]
    further = [tensor for path in beside if path.is_file() for tensor in _open(path).tensors()]
    stored = {}
    for tensor in (*_weights(directory), *further):
        key = plain_key(tensor.name)
        if key in stored:
            places = f"{stored[key].file.name} and {tensor.file.name}"
            raise UserError(f"{directory} holds {key} twice, in {places}; copy the checkpoint again")
        stored[key] = tensor
    return stored


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's key and its numbers, in the mapping's order, one in memory at a time."""
    opened: dict[Path, _Safetensors | _TorchFile] = {}
    taken = 0
    for key, tensor in stored.items():
        if taken > OPEN_BYTES:
            opened.clear()
            taken = 0
        if tensor.file not in opened:
            opened[tensor.file] = _open(tensor.file)
        taken += tensor.nbytes
        yield key, opened[tensor.file].read(tensor.name)


def _weights(directory: Path) -> list[Stored]:
    """The weights proper: by an index, or those of the single file; safetensors before PyTorch's."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _indexed(index)
        if (directory / single).is_file():
            return _open(directory / single).tensors()
    raise UserError(
        f"{directory} holds no model.safetensors and no pytorch_model.bin; give the folder of a Janus checkpoint"
    )


def _indexed(index: Path) -> list[Stored]:
    """The tensors of the files that an index names, which must hold what it says."""
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of weights ({error}); copy the checkpoint again") from error
    tensors = [t for name in sorted(set(listed.values())) for t in _open(index.parent / name).tensors()]
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    absent = sorted(key for key, name in listed.items() if (key, name) not in held)
    if absent:
        raise UserError(f"{index} names tensors that its files do not hold: {some(absent)}; copy the checkpoint again")
    omitted = sorted({key for key, _ in held} - listed.keys())
    if omitted:
        raise UserError(f"{index} omits tensors that its files hold: {some(omitted)}; copy the checkpoint again")
    return tensors


def _open(path: Path) -> _Safetensors | _TorchFile:
    if not path.is_file():
        raise UserError(f"{path} is named by its index but is not there; copy the checkpoint again")
    return _Safetensors(path) if path.suffix == ".safetensors" else _TorchFile(path)


def some(items: list[str], limit: int = 12) -> str:
    """The first items and how many more there are, for messages."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def write_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file, readable for whoever may read new files there: the library's own is for its owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
