"""Checksums of a checkpoint's arrays, saved with them, because Orbax and TensorStore store arrays without a hash.

The bits of the elements are summed along the last axis, and separately along all other axes. Each of these sums is
multiplied by an odd number that depends on its index, and the products are added, all modulo 2^32. This gives two
checksums per array. A change of one element always changes the first checksum. An exchange of two rows also changes
the first, an exchange of two columns the second. Other damage goes undetected with a probability of about 2^-32 or
less. Integer sums do not depend on the order of addition. Arrays are therefore summed where they are, shard by shard,
and the checksums are the same on any mesh.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from arrag_jax.json_files import read_object
from arrag_jax.parsing import parse

WEIGHT = 2 * 1327217885  # even, so that a multiple plus 1 is odd; far from a power of two


@dataclasses.dataclass(frozen=True)
class Sums:
    """The checksums that are saved with a checkpoint.

    Attributes:
      state: both checksums of each array, by path.
      data, metrics: SHA-256 of the data position and of the metrics, as JSON.
    """

    state: dict[str, tuple[int, int]]
    data: str
    metrics: str


def sums_of(state: PyTree, data: Any, metrics: Mapping[str, float] | None) -> Sums:
    """Returns the checksums of everything in a checkpoint; every process of a run must call it."""
    return Sums(sums_of_arrays(state), digest_of(data), digest_of(metrics))


def sums_of_arrays(tree: PyTree) -> dict[str, tuple[int, int]]:
    """Returns both checksums of each array, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    # One at a time: CPU devices run several programs at once, and those of two processes could wait for each other.
    sums = [jax.device_get(_sums(_plain(leaf))) for _, leaf in leaves]
    return {name: (int(pair[0]), int(pair[1])) for name, pair in zip(names, sums, strict=True)}


def digest_of(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=float).encode()).hexdigest()


def read_sums(path: Path) -> Sums | None:
    """Returns the checksums in a checkpoint's folder; None if an earlier version without checksums wrote it.

    Raises:
      UserError: if they are damaged.
    """
    file = path / "sums" / "metadata"
    return parse(Sums, read_object(file), str(file)) if file.is_file() else None


def require_same(expected: Mapping[str, tuple[int, int]], tree: PyTree, prefix: str = "") -> None:
    """Raises ValueError with the name of the first array that differs from the saved one.

    Args:
      expected: both checksums of each saved array, by path.
      prefix: path of ``tree`` itself.
    """
    for name, found in sums_of_arrays(tree).items():
        if expected.get(prefix + name) != found:
            raise ValueError(f"{prefix}{name} is not what was saved")


def require_finite(tree: PyTree) -> None:
    """Raises ValueError with the name of the first array that holds NaN or an infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} holds NaN or infinite numbers")


def _plain(leaf: Any) -> Shaped[Array, "..."]:
    """Returns a leaf as an array of numbers, because random keys have a type of their own."""
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _sums(x: Shaped[Array, "..."]) -> Any:
    """Returns both checksums of an array, computed on its devices.

    On a CPU they are computed by numpy, which takes a quarter of XLA's time there.
    """
    x = x.reshape(1) if x.ndim == 0 else x
    if jax.default_backend() == "cpu" and x.is_fully_addressable:
        bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
        return _folded(np, bits)
    return _on_devices(x)


@jax.jit
def _on_devices(x: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    return _folded(jnp, jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}")))


def _folded(numpy: Any, bits: Any) -> Any:
    """Returns both checksums of unsigned integers, computed by ``numpy`` or ``jax.numpy``."""

    def weighed(part: Any) -> Any:
        weights = numpy.arange(part.size, dtype=np.uint32) * np.uint32(WEIGHT) + np.uint32(1)
        return numpy.sum(part.reshape(-1) * weights, dtype=np.uint32)

    rows = numpy.sum(bits, axis=-1, dtype=np.uint32)
    columns = numpy.sum(bits, axis=tuple(range(bits.ndim - 1)), dtype=np.uint32)
    return numpy.stack([weighed(rows), weighed(columns)])
