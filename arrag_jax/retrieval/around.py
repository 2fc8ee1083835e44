"""Exact search by two-sided keys (``ops.keys.around``) on the device, for positions between known codes.

The device holds the eight neighbours' codes of every unique context, 16 bytes each. A query makes a table of its
distances to all codes; the distance of a context is a sum of eight looked-up numbers, in whole numbers and so exact.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from arrag_jax.forks import require_own_process
from arrag_jax.ops.distances import in_float
from arrag_jax.ops.grid import next_codes_of_grids
from arrag_jax.ops.keys import around
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.captions import LimitedRetriever, rows_of_images
from arrag_jax.retrieval.dense import exact_top_k, require_k
from arrag_jax.retrieval.patches import posting_lists
from arrag_jax.retrieval.ranking import lay_out
from arrag_jax.store.datastore import Datastore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseAround:
    """An ``interfaces.AroundRetriever``; make one with ``of`` or ``of_store``.

    Equal distances are ordered by stored row, as in ``DenseRetriever``.

    Attributes:
      contexts: [8, U], code ids around the unique contexts, V where there is no neighbour.
      codes, starts, rows: the patches of each context, as in ``DenseRetriever``; without ``starts`` and ``rows`` each
        patch counts as a context of its own.
      codebook: float32 [V, C].
      k: neighbours per query.
    """

    contexts: Any
    codes: Any
    codebook: Any
    k: int = dataclasses.field(metadata={"static": True})
    starts: Any = None
    rows: Any = None

    @classmethod
    def of(
        cls,
        grids: Integer[np.ndarray, "n H W"],
        codebook: Float[np.ndarray | Array, "V C"],
        k: int,
        shown: Bool[np.ndarray, " n"] | None = None,
        deduplicate: bool = True,
    ) -> "DenseAround":
        """Returns a search over the patches of code grids; puts the arrays on the default device.

        Args:
          shown: which images may be found; None = all.
          deduplicate: whether equal contexts are held once, which changes no answer.

        Raises:
          UserError: if k is not in 1..N.
        """
        contexts, codes, size = around.stored(grids), next_codes_of_grids(grids).reshape(-1), len(codebook)
        require_k(k, len(codes))
        contexts = np.where(contexts < 0, size, contexts).astype(np.uint16 if size < 2**16 else np.int32)
        starts, rows = None, np.arange(len(codes), dtype=np.int32)
        if shown is not None:
            rows = rows[np.repeat(shown, len(codes) // len(grids))]
        if deduplicate:
            contexts, starts, rows = _unique(contexts[rows], rows)
        elif shown is not None:
            codes = np.where(np.isin(np.arange(len(codes)), rows), codes.astype(np.int32), -1)
        codes = codes[rows] if deduplicate else codes
        put = [None if x is None else jnp.asarray(x) for x in (starts, rows if deduplicate else None)]
        table = jnp.asarray(codebook, jnp.float32)
        return cls(jnp.asarray(np.ascontiguousarray(contexts.T)), jnp.asarray(codes), table, k, *put)

    @classmethod
    def of_store(cls, store: Datastore, k: int) -> "DenseAround":
        """Returns a search over a store; errors as in ``of``."""
        return cls.of(store.codes, store.codebook, k, store.shown)

    def search_around(self, codes: Int[Array, "B 8"]) -> Neighbors:
        """Returns the neighbours of positions with these codes around them; see ``ops.keys.around``."""
        require_own_process()
        high, low = around.squares(self.codebook, codes)
        kept = min(self.k, self.contexts.shape[1])

        def nearest(tables: tuple[Array, Array]) -> tuple[Array, Array]:
            looked_up = [[jnp.take(x[i], each, mode="clip") for i, each in enumerate(self.contexts)] for x in tables]
            distance = in_float(*(functools.reduce(jnp.add, parts) for parts in looked_up))
            if self.starts is None:
                distance = jnp.where(self.codes < 0, jnp.inf, distance)
            # Without a barrier the lookups would be fused into the top-k, which does them again and again.
            score, unique = exact_top_k(-jax.lax.optimization_barrier(distance)[None], kept)
            return -score[0], unique[0]

        distance, unique = jax.lax.map(nearest, (high, low))
        found = around.complete(codes)[:, None] & jnp.isfinite(distance)
        unique, distance = jnp.where(found, unique, -1), jnp.where(found, distance, jnp.inf)
        return lay_out(unique, distance, self.k, self.codes, self.starts, self.rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LimitedAround(LimitedRetriever):
    """An ``interfaces.AroundRetriever`` that searches different images for each prompt; make one with ``create``."""

    @classmethod
    def create(cls, store: Datastore, images: Int[np.ndarray, "B M"], kind: str, k: int) -> "LimitedAround":
        """Returns a search over M images of the store per prompt; arguments as in ``LimitedRetriever.create``."""
        searches = [DenseAround.of(store.codes[chosen], store.codebook, k, deduplicate=False) for chosen in images]
        local = jax.tree.map(lambda *leaves: jnp.stack(leaves), *searches)
        return cls(local, jnp.asarray(rows_of_images(images, store.settings.patches_per_image)))

    def search_around(self, codes: Int[Array, "n 8"]) -> Neighbors:
        """Returns the neighbours of n positions, those of the first prompt first."""
        return self._of_each(codes, lambda local, own: local.search_around(own))


def _unique(
    contexts: Integer[np.ndarray, "n 8"], rows: Int[np.ndarray, " n"]
) -> tuple[np.ndarray, Int[np.ndarray, " U1"], Int[np.ndarray, " n"]]:
    """Returns the unique contexts in the order of their first patches, where their patches start, and these."""
    order = np.lexsort(contexts.T).astype(np.int32)  # stable, so rows stay in order
    ordered = contexts[order]
    first, _, starts, patches = posting_lists(order, (ordered[1:] != ordered[:-1]).any(1))
    return ordered[first], starts, rows[patches]
