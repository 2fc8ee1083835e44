"""Either search, sharded over a mesh axis: each device searches its rows, and the answers are merged."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.ops import handles
from arrag_jax.ops.neighbors import Neighbors, merge_neighbors
from arrag_jax.retrieval.dense import DenseRetriever, leaves_of, require_k
from arrag_jax.retrieval.patches import Patches
from arrag_jax.retrieval.scann import HostSearch, ScannRetriever, shard_bounds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedRetriever:
    """One retriever a shard as one ``interfaces.Retriever``; make one with ``shard_dense`` or ``shard_scann``.

    On a mesh a host callback must stand inside ``shard_map``: outside it runs once, on the first device,
    with the gathered batch.

    Attributes:
      local: a retriever whose every leaf has a leading axis S, sharded over ``axis``.
      first_row: int32 [S], the row number of each shard's first row; sharded over ``axis``.
      mesh: where to run.
      axis: the mesh axis, of size S, that the store is sharded over.
      batch_axis: the mesh axis that queries are sharded over; None: every device gets all queries.
    """

    local: Any
    first_row: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})
    batch_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def k(self) -> int:
        return self.local.k

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids; see ``interfaces.Retriever``."""
        require_own_process()

        def search_shard(local: Any, first_row: Array, context: Array) -> Neighbors:
            local = jax.tree.map(lambda leaf: leaf[0], local)
            found = local.search(context)
            found = found._replace(id=jnp.where(found.id >= 0, found.id + first_row[0], -1))
            return merge_neighbors(jax.lax.all_gather(found, self.axis), self.k)

        return jax.shard_map(
            search_shard,
            mesh=self.mesh,
            in_specs=(P(self.axis), P(self.axis), P(self.batch_axis)),
            out_specs=P(self.batch_axis),
            check_vma=False,  # the merged result is equal on all devices, which the checker can't see
        )(self.local, self.first_row, context)


def shard_dense(
    patches: Callable[[tuple[int, int]], Patches],
    num_rows: int,
    codebook: Float[np.ndarray, "V C"],
    k: int,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    storage: str = "float32",
) -> ShardedRetriever:
    """The search of every key, with the unique contexts spread over a mesh axis.

    Args:
      patches: from first row and end of a shard to its patches; asked for this process' shards alone.
      num_rows: N.
      codebook, k, storage: as ``DenseRetriever.of``.

    Raises:
      UserError: as ``DenseRetriever.of``.
    """
    require_k(k, num_rows)
    bounds = shard_bounds(num_rows, mesh.shape[axis])
    parts, kinds = {}, {}
    for s in local_shards(mesh, axis):
        part = patches(bounds[s])
        parts[s], kinds[s] = leaves_of(part, storage), part.kind
    one, kind = next(iter(parts.values())), next(iter(kinds.values()))
    held = [name for name, leaf in one.items() if leaf is not None]
    # shards are padded to one size, with contexts that have no patches and rows that have no code
    sizes = {name: _largest(max(len(part[name]) for part in parts.values())) for name in held}

    def padded(name: str, s: int) -> np.ndarray:
        leaf = parts[s][name]
        empty = {"starts": len(parts[s]["codes"]), "codes": 0 if "starts" in held else -1}.get(name, 0)
        missing = [(0, sizes[name] - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)
        return np.pad(leaf, missing, constant_values=empty)

    leaves: dict[str, Any] = dict.fromkeys(one) | {
        name: _stacked(functools.partial(padded, name), (sizes[name], *one[name].shape[1:]), mesh, axis)
        for name in held
    }
    codebook = np.asarray(codebook, np.float32)
    leaves["codebook"] = _stacked(lambda s: codebook, codebook.shape, mesh, axis)
    local = DenseRetriever(kind=kind, k=k, **leaves)
    return ShardedRetriever(local, _first_rows(bounds, mesh, axis), mesh, axis, batch_axis)


def local_shards(mesh: Mesh, axis: str) -> list[int]:
    """The shards along a mesh axis that devices of this process search."""
    shards = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    here = jax.process_index()
    return [s for s, devices in enumerate(shards) if any(d.process_index == here for d in np.ravel(devices))]


def _largest(size: int) -> int:
    """The largest of all processes' numbers."""
    return size if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(size)).max())


def shard_scann(host: HostSearch, mesh: Mesh, axis: str, batch_axis: str | None = None) -> ShardedRetriever:
    """ScaNN searchers, one a device along a mesh axis.

    Args:
      host: of as many shards as the axis is long, with searches for ``local_shards`` (``index.load_index``).

    Raises:
      UserError: the numbers differ.
    """
    if len(host.bounds) != mesh.shape[axis]:
        raise UserError(f"an index of {len(host.bounds)} shards does not fit mesh axis {axis!r} of {mesh.shape[axis]}")
    handle = handles.Handle(host)  # each process has a number of its own
    shard, number = (_stacked(leaf, (), mesh, axis) for leaf in (np.int32, lambda _: np.int32(handle.number)))
    local = ScannRetriever(shard, number, host.k, handle)
    return ShardedRetriever(local, _first_rows(host.bounds, mesh, axis), mesh, axis, batch_axis)


def _first_rows(bounds: list[tuple[int, int]], mesh: Mesh, axis: str) -> Array:
    return _stacked(lambda s: np.int32(bounds[s][0]), (), mesh, axis)


def _stacked(shard: Callable[[int], Any], shape: tuple[int, ...], mesh: Mesh, axis: str) -> Array:
    """[S, *shape] over a mesh axis; each process makes the shards of its own devices alone."""
    number = mesh.shape[axis]

    def made(index: Any) -> np.ndarray:
        return np.stack([shard(s) for s in range(number)[index[0]]])

    return jax.make_array_from_callback((number, *shape), NamedSharding(mesh, P(axis)), made)
