"""A store that methods search, opened with the search over it and with what it tells about prompts and images."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arrag_jax.config import DrawConfig, RetrievalConfig
from arrag_jax.decode.methods import Method, Search, search_config
from arrag_jax.evaluation.trust import Trust
from arrag_jax.interfaces import AnyRetriever, ImageModel
from arrag_jax.mesh import put_everywhere
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.retrieval.around import DenseAround
from arrag_jax.retrieval.copies import UncopiedRetriever
from arrag_jax.retrieval.load import backbone_of, load_retriever, open_store, resolved
from arrag_jax.retrieval.stored_codes import StoredCodes
from arrag_jax.store.datastore import Datastore


@dataclasses.dataclass(frozen=True)
class OpenSearch:
    """A store and the search over it.

    Attributes:
      config: the settings of the search.
      retriever: searches the whole store; None if no requested method does.
      trust: the store's captions, and how well the model knows its images.
      copies: the tables that ``uncopied`` compares with, without a search; None if copies are not looked for.
    """

    config: RetrievalConfig
    store: Datastore
    retriever: AnyRetriever | None
    trust: Trust
    copies: UncopiedRetriever | None = None

    @functools.cached_property
    def stored(self) -> StoredCodes:
        """The code grids, for the guard against copies and for guesses of windows."""
        codes = self.store.codes if self.store.shown is None else self.store.codes[self.store.shown]
        return StoredCodes.of(codes, self.store.settings.codebook_size)

    @functools.cached_property
    def two_sided(self) -> "OpenSearch":
        """The same store, searched by two-sided keys (``ops.keys.around``)."""
        config = dataclasses.replace(self.config, keys="codebook", search="dense", storage="codes", two_sided=True)
        retriever = None if self.retriever is None else DenseAround.of_store(self.store, config.k)
        return dataclasses.replace(self, config=config, retriever=retriever)

    def with_k(self, k: int) -> "OpenSearch":
        """Returns the same store, searched for another number of neighbours.

        Raises:
          UserError: if the store holds fewer patches.
        """
        retriever: Any = self.retriever
        config = dataclasses.replace(self.config, k=k)
        return dataclasses.replace(self, config=config, retriever=None if retriever is None else retriever.with_k(k))

    def uncopied(self, retriever: Any) -> AnyRetriever:
        """Returns a search over this store without the neighbours that ``config.hidden.copy_share`` leaves out."""
        return retriever if self.copies is None else dataclasses.replace(self.copies, local=retriever)


def open_search(
    config: DrawConfig, search: Search, methods: Sequence[Method], model: ImageModel, mesh: Mesh | None
) -> OpenSearch:
    """Returns a search that these methods use; the whole store is searched only if one of them is not limited."""
    asked = resolved(search_config(config, search), mesh)
    backbone = backbone_of(model, asked.keys)
    if all(method.limited for method in methods):
        store, retriever = open_store(asked, model.fingerprint, backbone)[0], None
    else:
        store, retriever = load_retriever(asked, model.fingerprint, mesh, "fsdp", "data", backbone)
    if any(method.limited for method in methods):
        _ = store.captions  # raises now, not after the first batches
    trust, copies = Trust(store, config.caption), None
    if asked.keys == HIDDEN.name and config.hidden.copy_share < 1:
        tables = store.codes.reshape(store.num_images, -1), trust.told.surprise, np.float32(config.hidden.copy_share)
        codes, surprise, most = jax.tree.map(jnp.asarray, tables) if mesh is None else put_everywhere(tables, mesh)
        copies = UncopiedRetriever(None, codes, surprise, most, store.settings.grid)
    opened = OpenSearch(asked, store, None, trust, copies)
    return opened if retriever is None else dataclasses.replace(opened, retriever=opened.uncopied(retriever))
