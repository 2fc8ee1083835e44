"""Sums over a checkpoint's arrays, saved beside them: Orbax and TensorStore give stored arrays no hash of their own.

The elements' bits are summed along the last axis and along all the others; each of these sums is taken times an odd
number that follows from its place, and the products are summed, all modulo 2^32. A change of one element always changes
the first of both numbers, and so does any exchange of rows or, of the second, of columns; other damage escapes with a
chance of about 2^-32 or less. Integers may be added up in any order, so arrays are summed where they lie, shard by
shard, and the sums are the same over any mesh.
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

WEIGHT = 2 * 1327217885  # even, so that one more is odd; and far from a power of two


@dataclasses.dataclass(frozen=True)
class Sums:
    """What is saved beside a checkpoint.

    Attributes:
      state: both sums of each array, by path.
      data, metrics: SHA-256 of the data position and of the metrics, as JSON.
    """

    state: dict[str, tuple[int, int]]
    data: str
    metrics: str


def sums_of(state: PyTree, data: Any, metrics: Mapping[str, float] | None) -> Sums:
    """The sums of all that a checkpoint holds; every process of a run has to call it."""
    return Sums(sums_of_arrays(state), digest_of(data), digest_of(metrics))


def sums_of_arrays(tree: PyTree) -> dict[str, tuple[int, int]]:
    """Both sums of each array, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = jax.device_get([_sums(_plain(leaf)) for _, leaf in leaves])  # all are under way before the first is fetched
    return {name: (int(pair[0]), int(pair[1])) for name, pair in zip(names, sums, strict=True)}


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=float).encode()).hexdigest()


def read_sums(path: Path) -> Sums | None:
    """The sums in a checkpoint's folder; None in one from before there were any.

    Raises:
      UserError: they are damaged.
    """
    file = path / "sums" / "metadata"
    return parse(Sums, read_object(file), str(file)) if file.is_file() else None


def require_same(expected: Mapping[str, tuple[int, int]], tree: PyTree, prefix: str = "") -> None:
    """Raises ValueError naming the first array that is not what was saved; ``prefix`` is the tree's own path."""
    for name, found in sums_of_arrays(tree).items():
        if expected.get(prefix + name) != found:
            raise ValueError(f"{prefix}{name} is not what was saved")


def require_finite(tree: PyTree) -> None:
    """Raises ValueError naming the first array that holds NaN or an infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} holds NaN or infinite numbers")


def _plain(leaf: Any) -> Shaped[Array, "..."]:
    """A leaf as an array of numbers: random keys have a type of their own."""
    leaf = jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _sums(x: Shaped[Array, "..."]) -> Any:
    """Both sums of an array, on its devices; on a CPU by numpy, which takes a quarter of XLA's time there."""
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
    """The sums of unsigned integers, by ``numpy`` or ``jax.numpy``."""

    def weighed(part: Any) -> Any:
        weights = numpy.arange(part.size, dtype=np.uint32) * np.uint32(WEIGHT) + np.uint32(1)
        return numpy.sum(part.reshape(-1) * weights, dtype=np.uint32)

    rows = numpy.sum(bits, axis=-1, dtype=np.uint32)
    columns = numpy.sum(bits, axis=tuple(range(bits.ndim - 1)), dtype=np.uint32)
    return numpy.stack([weighed(rows), weighed(columns)])
