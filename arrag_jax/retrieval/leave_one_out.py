"""Leave-one-out search: finds the nearest patches of other images, never those of the query's own image."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped, UInt64

from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import no_neighbors, packed
from arrag_jax.retrieval.scann import ScannRetriever
from arrag_jax.store.datastore import Datastore

ANSWERS = 2**15  # neighbours requested per call of the search: 2048 contexts at k = 16
WIDER = 4  # factor by which k grows if too few neighbours remain


class LeaveOneOut:
    """Searches a store for all positions of images; an image never gets its own patches as neighbours.

    The search excludes stored images with the same name, and stored images with the same code grid (exact duplicates).
    The name is needed because an image that is encoded in another batch or on another device may differ in a code. A
    context that occurs at many positions is searched once; each state is searched on its own. If fewer than K
    neighbours remain, the request is searched again with ``WIDER`` times the k, until K remain or the search finds no
    more.
    """

    def __init__(
        self,
        store: Datastore,
        names: Sequence[str],
        retriever: DenseRetriever | ScannRetriever,
        keys: str = "codebook",
    ):
        """
        Args:
          store: the store to search; its codebook has at most 2**16 codes.
          names: the names of its images, in order.
          retriever: a search of that store; its k is K.
          keys: the kind of key that it searches.
        """
        self.numbers: dict[str, int] = {}
        self.stored = np.array([self.numbers.setdefault(name, len(self.numbers)) for name in names], np.int32)
        self.codes, self.k, self.rows = store.codes, retriever.k, store.num_rows(keys)
        self.patches = len(KEY_KINDS[keys].positions(store.settings.grid))
        self.retrievers = {retriever.k: retriever}
        self.weights = np.random.default_rng(0).integers(2**64, size=store.codes[0].size, dtype=np.uint64)
        self.sums = self._sums(store.codes)

    def search(
        self,
        codes: Integer[np.ndarray, "B H W"],
        names: Sequence[str],
        count: Callable[[int], Any] = lambda images: None,
        states: Float[np.ndarray, "n E"] | None = None,
    ) -> Neighbors:
        """Returns the neighbours of every position that has a key, [B·M, K], nearest first, as numpy arrays.

        Args:
          codes: the code grids of the images.
          names: the names of the images; the store need not hold images with these names.
          count: called with the number of images finished since its last call; the numbers sum to B.
          states: the projected states of all positions, for a search by state; n = B·T. None = contexts are searched.
        """
        if states is None:
            requests: Any = grid_ops.contexts_of_grids(codes.astype(np.int32)).reshape(-1, 4)
            numbers = packed(requests)
        else:
            requests, numbers = states, np.arange(len(states))
        sums, requested = self._sums(codes), np.array([self.numbers.get(name, -1) for name in names], np.int32)
        best = no_neighbors(len(requests), self.k)
        left, k, unreported = np.arange(len(requests)), self.k, len(codes)
        while len(left):
            _, first, which = np.unique(numbers[left], return_index=True, return_inverse=True)
            found, unreported = self._ask(requests[left[first]], k, unreported, count), 0
            short = []
            for start in range(0, len(left), max(1, ANSWERS // k)):
                part = slice(start, start + max(1, ANSWERS // k))
                queries, answer = left[part], Neighbors(*(x[which[part]] for x in found))
                image, stored = queries // self.patches, np.asarray(answer.id) // self.patches
                own = self._equal(stored, codes, sums, image) | (self.stored[stored] == requested[image][:, None])
                own &= answer.id >= 0
                others = _nearest_others(answer, own, self.k)
                for all_, new in zip(best, others, strict=True):
                    all_[queries] = new
                # an answer with an empty slot is complete: a larger k finds no more
                short.append(queries[(others.id[:, -1] < 0) & (answer.id[:, -1] >= 0)])
            left = np.concatenate(short) if k < self.rows else left[:0]
            k = min(WIDER * k, self.rows)
        return Neighbors(*best)

    def _ask(self, requests: Shaped[np.ndarray, "n E"], k: int, images: int, count: Callable[[int], Any]) -> Neighbors:
        """Searches the store, ``ANSWERS`` slots per call; spreads ``images`` evenly over the calls of ``count``."""
        if k not in self.retrievers:
            self.retrievers[k] = self.retrievers[self.k].with_k(k)
        found, number, size = [], len(requests), max(1, ANSWERS // k)
        for start in range(0, number, size):
            part = requests[start : start + size]
            padded = np.pad(part, ((0, size - len(part)), (0, 0)), constant_values=-1)
            answer = _search(self.retrievers[k], padded)
            found.append([np.asarray(x)[: len(part)] for x in answer])
            count(images * (start + len(part)) // number - images * start // number)
        return Neighbors(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _equal(
        self,
        stored: Int[np.ndarray, "n k"],
        codes: Integer[np.ndarray, "B H W"],
        sums: UInt64[np.ndarray, " B"],
        image: Int[np.ndarray, " n"],
    ) -> Bool[np.ndarray, "n k"]:
        """Returns which stored images have the same grid as the query's image, ``codes[image]``."""
        equal = self.sums[stored] == sums[image][:, None]
        query, slot = np.nonzero(equal)  # few enough to compare the grids in full
        equal[query, slot] = (self.codes[stored[query, slot]] == codes[image[query]]).all((1, 2))
        return equal

    def _sums(self, grids: Integer[np.ndarray, "n H W"]) -> UInt64[np.ndarray, " n"]:
        """Returns a checksum per grid; equal grids have equal checksums, other grids almost never."""
        return np.array([grid.reshape(-1).astype(np.uint64) @ self.weights for grid in grids])


@jax.jit
def _search(retriever: DenseRetriever | ScannRetriever, requests: Shaped[jax.Array, "n E"]) -> Neighbors:
    return retriever.search(requests)


def _nearest_others(found: Neighbors, own: Bool[np.ndarray, "n k"], k: int) -> Neighbors:
    """Returns the first k slots that are not ``own``; empty slots come last."""
    order = np.argsort(own, axis=1, kind="stable")[:, :k]
    own, code, distance, id_ = (np.take_along_axis(x, order, 1) for x in (own, *found))
    return Neighbors(np.where(own, -1, code), np.where(own, np.inf, distance), np.where(own, -1, id_))
