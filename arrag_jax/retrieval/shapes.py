"""A dense search of shapes alone, to compile programs that search a store of a given size."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arrag_jax.config import RetrievalConfig
from arrag_jax.errors import UserError
from arrag_jax.mesh import abstract_state
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.sharded import ShardedRetriever


def dense_shapes(
    config: RetrievalConfig, patches: int, codebook: tuple[int, int], mesh: Mesh, axis: str, batch_axis: str
) -> ShardedRetriever:
    """Returns the search that ``load_retriever`` would open over a mesh.

    Args:
      config: its kind of key must be one of the context's. The search is dense, whatever it says.
      patches: number of stored patches; each counts as a context of its own, which is the most that a store can hold.
      codebook: V and C.
    """
    if config.two_sided:
        raise UserError("--topology compiles searches over a mesh, and two_sided=True runs on one device; leave it out")
    shards = mesh.shape[axis]
    rows, kind = -(-patches // shards), KEY_KINDS[config.keys]
    storage = config.storage if config.search == "dense" or config.keys != "codebook" else "codes"

    def leaf(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shards, *shape), dtype)

    unique = config.keys == "codebook"
    local = DenseRetriever(
        keys=None if storage == "codes" else leaf((rows, 4 * codebook[1]), jnp.dtype(storage)),
        codes=leaf((rows,), jnp.uint16 if unique else jnp.int32),
        table=leaf(codebook, jnp.float32),
        kind=kind,
        k=config.k,
        contexts=leaf((rows, 4), jnp.uint16) if unique else None,
        starts=leaf((rows + 1,), jnp.int32) if unique else None,
        rows=leaf((rows,), jnp.int32) if unique else None,
    )
    search = ShardedRetriever(local, leaf((), jnp.int32), mesh, axis, batch_axis)
    return abstract_state(search, mesh, P(axis))
