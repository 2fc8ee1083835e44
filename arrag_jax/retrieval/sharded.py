"""Dense or ScaNN search sharded over a mesh axis: each device searches its rows, and the answers are merged."""

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
    """An ``interfaces.Retriever`` of one retriever per shard; make one with ``shard_dense`` or ``shard_scann``.

    The search runs inside ``shard_map``, because outside of it a host callback on a mesh runs only once, on the first
    device, with the gathered batch.

    Attributes:
      local: the stacked retrievers: every leaf has a leading axis S, sharded over ``axis``.
      first_row: int32 [S], the row number of each shard's first row; sharded over ``axis``.
      mesh: the mesh of devices.
      axis: the mesh axis, of size S, over which the store is sharded.
      batch_axis: the mesh axis over which queries are sharded; None = every device gets all queries.
    """

    local: Any
    first_row: Any
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})
    batch_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def k(self) -> int:
        return self.local.k

    def search(self, context: Int[Array, "B 4"] | Float[Array, "B E"]) -> Neighbors:
        """Returns the neighbours of B contexts given as code ids, or of B projected states."""
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
            check_vma=False,  # the merged result is equal on all devices, but the checker cannot infer that
        )(self.local, self.first_row, context)


def shard_dense(
    patches: Callable[[tuple[int, int]], Patches],
    num_rows: int,
    table: Float[np.ndarray, "n_table C"],
    k: int,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    storage: str = "float32",
) -> ShardedRetriever:
    """Returns a dense search with the stored patches sharded over a mesh axis.

    Args:
      patches: (first row, end) of a shard → its patches; called only for the shards of this process.
      num_rows: N.
      table, k, storage: as in ``DenseRetriever.of``.
      mesh, axis, batch_axis: as in ``ShardedRetriever``.

    Raises:
      UserError: as in ``DenseRetriever.of``.
    """
    require_k(k, num_rows)
    bounds = shard_bounds(num_rows, mesh.shape[axis])
    parts, kinds = {}, {}
    for s in local_shards(mesh, axis):
        part = patches(bounds[s])
        parts[s], kinds[s] = leaves_of(part, storage), part.kind
    one, kind = next(iter(parts.values())), next(iter(kinds.values()))
    held = [name for name, leaf in one.items() if leaf is not None]
    # All shards need one size. They are padded with contexts without patches, or rows without a code.
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
    table = np.asarray(table, np.float32)
    leaves["table"] = _stacked(lambda s: table, table.shape, mesh, axis)
    local = DenseRetriever(kind=kind, k=k, **leaves)
    return ShardedRetriever(local, _first_rows(bounds, mesh, axis), mesh, axis, batch_axis)


def local_shards(mesh: Mesh, axis: str) -> list[int]:
    """Returns the shards along a mesh axis that devices of this process search."""
    shards = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    here = jax.process_index()
    return [s for s, devices in enumerate(shards) if any(d.process_index == here for d in np.ravel(devices))]


def _largest(size: int) -> int:
    """Returns the maximum of ``size`` over all processes."""
    return size if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int64(size)).max())


def shard_scann(host: HostSearch, mesh: Mesh, axis: str, batch_axis: str | None = None) -> ShardedRetriever:
    """Returns a search with one ScaNN searcher per device along a mesh axis.

    Args:
      host: a search with one shard per device along the axis, and the searchers of ``local_shards``
        (``index.load_index``).
      mesh, axis, batch_axis: as in ``ShardedRetriever``.

    Raises:
      UserError: if the number of shards is not the size of the axis.
    """
    if len(host.bounds) != mesh.shape[axis]:
        raise UserError(f"an index of {len(host.bounds)} shards does not fit mesh axis {axis!r} of {mesh.shape[axis]}")
    handle = handles.Handle(host)  # its number differs between processes
    shard, number = (_stacked(leaf, (), mesh, axis) for leaf in (np.int32, lambda _: np.int32(handle.number)))
    local = ScannRetriever(shard, number, host.k, handle)
    return ShardedRetriever(local, _first_rows(host.bounds, mesh, axis), mesh, axis, batch_axis)


def _first_rows(bounds: list[tuple[int, int]], mesh: Mesh, axis: str) -> Array:
    return _stacked(lambda s: np.int32(bounds[s][0]), (), mesh, axis)


def _stacked(shard: Callable[[int], Any], shape: tuple[int, ...], mesh: Mesh, axis: str) -> Array:
    """Returns an array [S, *shape] sharded over a mesh axis; each process computes only its own devices' shards."""
    number = mesh.shape[axis]

    def made(index: Any) -> np.ndarray:
        return np.stack([shard(s) for s in range(number)[index[0]]])

    return jax.make_array_from_callback((number, *shape), NamedSharding(mesh, P(axis)), made)
