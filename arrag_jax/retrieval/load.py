"""From a config to a store and its search."""

from jax.sharding import Mesh

from arrag_jax.config import RetrievalConfig
from arrag_jax.interfaces import Retriever
from arrag_jax.retrieval.datastore import Datastore
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.index import load_index
from arrag_jax.retrieval.patches import Patches, stored_patches
from arrag_jax.retrieval.scann import ScannRetriever, build_host
from arrag_jax.retrieval.sharded import local_shards, shard_dense, shard_scann


def open_store(config: RetrievalConfig, fingerprint: str) -> tuple[Datastore, bool]:
    """Opens the images of a datastore that a config asks for, and tells whether these are all it holds.

    Raises:
      UserError: no such store, or one of another tokenizer.
    """
    store = Datastore.open(config.store)
    store.require_tokenizer(fingerprint)
    whole = config.num_images in (0, store.num_images)
    return store if whole else store.subset(config.num_images), whole


def index_hash_of(retriever: Retriever | None) -> str:
    """The hash of the saved index that a search asks (``index.index_hash``); empty where it asks none."""
    asked = getattr(retriever, "local", retriever)
    return asked.host.index_hash if isinstance(asked, ScannRetriever) else ""


def load_retriever(
    config: RetrievalConfig,
    fingerprint: str,
    mesh: Mesh | None = None,
    axis: str = "data",
    batch_axis: str | None = None,
) -> tuple[Datastore, Retriever]:
    """Opens a datastore and its search.

    Args:
      config: which store, which keys, which search.
      fingerprint: of the model's tokenizer, which must have made the store.
      mesh: spread the store over ``axis`` of this mesh; None: keep it on one device (or one host).
      batch_axis: mesh axis that queries are sharded over; see ``ShardedRetriever``.

    Raises:
      UserError: no such store or index, one of another tokenizer, or k larger than the store.
    """
    store, whole = open_store(config, fingerprint)

    def patches(rows: tuple[int, int]) -> Patches:
        return stored_patches(store, config.keys, rows)

    if config.search == "dense":
        if mesh is None:
            whole_store = patches((0, store.num_patches))
            return store, DenseRetriever.of(whole_store, store.codebook, config.k, config.storage)
        spread = (mesh, axis, batch_axis, config.storage)
        return store, shard_dense(patches, store.num_patches, store.codebook, config.k, *spread)
    shards, local = (1, [0]) if mesh is None else (mesh.shape[axis], local_shards(mesh, axis))
    if whole:
        host = load_index(store, config.keys, config.k, config.scann, shards, local)
    else:  # a saved index covers the whole store
        host = build_host(patches, store.num_patches, store.codebook, config.k, config.scann, shards, local)
    return store, ScannRetriever.of(host) if mesh is None else shard_scann(host, mesh, axis, batch_axis)
