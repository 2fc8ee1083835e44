"""From a config to a retriever: opens the store, checks it against the model, loads or builds the search."""

from arrag_jax.config import RetrievalConfig
from arrag_jax.interfaces import Retriever
from arrag_jax.retrieval.datastore import Datastore
from arrag_jax.retrieval.dense import DenseRetriever, require_k
from arrag_jax.retrieval.index import load_index
from arrag_jax.retrieval.scann import ScannRetriever


def open_store(config: RetrievalConfig, fingerprint: str) -> Datastore:
    """The configured store, or its first ``num_images`` images.

    Raises:
      UserError: no such store, one made with another tokenizer, or fewer patches than neighbours asked.
    """
    store = Datastore.open(config.store)
    store.require_tokenizer(fingerprint)
    store = store.subset(config.num_images) if config.num_images else store
    require_k(config.k, store.num_patches)
    return store


def open_retriever(config: RetrievalConfig, store: Datastore) -> Retriever:
    """The configured search over a store.

    Raises:
      UserError: no index, or one of another store or other options; ScaNN is not installed.
    """
    if config.search == "dense":
        return DenseRetriever.create(store.keys(config.keys), store.values, store.codebook, config.k)
    if config.num_images:
        return ScannRetriever.create(store.keys(config.keys), store.values, store.codebook, config.k, config.scann)
    return ScannRetriever.of(load_index(store, config.keys, config.k, config.scann))
