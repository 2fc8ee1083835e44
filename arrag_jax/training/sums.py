"""Sums over a checkpoint's arrays, saved beside them: Orbax and TensorStore give stored arrays no hash of their own.

An array's sums are those of its elements' bits, plain and each times an odd number that follows from its place, modulo
2^32. A change of one element always changes them, others escape with a chance of about 2^-32 or less. They are added up
where the array lies, shard by shard, so they are the same over any mesh and need no copy on a host.
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

MIXER = 2654435761  # odd, and far from a power of two


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


@jax.jit
def _sums(x: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = place * jnp.uint32(2 * (MIXER % 2**31)) + jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])
