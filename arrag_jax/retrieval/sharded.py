"""Either search, sharded over a mesh axis: each device searches its rows, and the answers are merged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.ops.neighbors import Neighbors, merge_neighbors
from arrag_jax.retrieval.dense import DenseRetriever, require_k
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
    keys: Float[np.ndarray, "N E"],
    codes: Int[np.ndarray, " N"],
    codebook: Float[np.ndarray, "V C"],
    k: int,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
) -> ShardedRetriever:
    """The exact search with its keys spread over a mesh axis; arguments as ``DenseRetriever.create``.

    Raises:
      UserError: k is not in 1..N.
    """
    require_k(k, len(codes))
    bounds = shard_bounds(len(codes), mesh.shape[axis])
    most = max(k, *(end - first for first, end in bounds))  # shards are padded with empty rows to one size

    def padded(array: np.ndarray, empty: int) -> Callable[[int], np.ndarray]:
        def shard(s: int) -> np.ndarray:
            part = array[slice(*bounds[s])]
            return np.pad(part, [(0, most - len(part))] + [(0, 0)] * (array.ndim - 1), constant_values=empty)

        return shard

    keys, codes, codebook = np.asarray(keys, np.float32), np.asarray(codes, np.int32), np.asarray(codebook, np.float32)
    local = DenseRetriever(
        _stacked(padded(keys, 0), mesh, axis),
        _stacked(padded(codes, -1), mesh, axis),
        _stacked(lambda s: codebook, mesh, axis),
        k,
    )
    return ShardedRetriever(local, _first_rows(bounds, mesh, axis), mesh, axis, batch_axis)


def shard_scann(host: HostSearch, mesh: Mesh, axis: str, batch_axis: str | None = None) -> ShardedRetriever:
    """ScaNN searchers, one a device along a mesh axis.

    Args:
      host: of as many shards as the axis is long (``scann.build_host``, ``index.load_index``).

    Raises:
      UserError: the numbers differ.
    """
    if len(host.bounds) != mesh.shape[axis]:
        raise UserError(f"an index of {len(host.bounds)} shards does not fit mesh axis {axis!r} of {mesh.shape[axis]}")
    local = ScannRetriever(_stacked(lambda s: np.int32(s), mesh, axis), host, host.k)
    return ShardedRetriever(local, _first_rows(host.bounds, mesh, axis), mesh, axis, batch_axis)


def _first_rows(bounds: list[tuple[int, int]], mesh: Mesh, axis: str) -> Array:
    return _stacked(lambda s: np.int32(bounds[s][0]), mesh, axis)


def _stacked(shard: Callable[[int], np.ndarray], mesh: Mesh, axis: str) -> Array:
    """[S, ...] over a mesh axis; each process makes the shards of its own devices alone."""
    shape = (mesh.shape[axis], *np.shape(shard(0)))
    return jax.make_array_from_callback(
        shape, NamedSharding(mesh, P(axis)), lambda index: np.stack([shard(s) for s in range(shape[0])[index[0]]])
    )
