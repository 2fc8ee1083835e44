"""Caption-aware retrieval: searches only the stored images whose captions are nearest to the prompt.

These images are chosen once, before sampling starts. By terms, the nearness of two texts is the cosine similarity of
their sets of terms (words, and pairs of neighbouring words). Each term is weighted by its inverse document frequency
among the stored captions. This needs no model. Pairs of words distinguish a blue car from a car next to something blue.
``evaluation.sentences`` is another rule.
"""

import abc
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.dense import SCORE_BYTES, DenseRetriever
from arrag_jax.retrieval.patches import KeysOfRows, Patches
from arrag_jax.store.datastore import Datastore


def terms(text: str) -> set[str]:
    """Returns the lower-case words of a text and its pairs of neighbouring words."""
    words = re.findall(r"\w+", text.lower())
    return {*words, *(" ".join(pair) for pair in itertools.pairwise(words))}


class CaptionIndex(abc.ABC):
    """How near the stored captions are to a prompt, by one of several rules."""

    def __init__(self, count: int, shown: Bool[np.ndarray, " n"] | None = None):
        """
        Args:
          count: number of stored images.
          shown: which of them may be chosen; None = all.
        """
        self.shown = np.ones(count, bool) if shown is None else shown
        self._count = count

    @abc.abstractmethod
    def cosine(self, prompt: str) -> Float[np.ndarray, " n"]:
        """Returns the nearness of every stored caption to a prompt, from 0 to 1; 0 for images that are not shown."""

    def nearest(self, prompts: Sequence[str], number: int) -> Int[np.ndarray, "B M"]:
        """Returns the ``number`` stored images with the nearest captions for each prompt, nearest first.

        Equally near images are ordered by their numbers.

        Raises:
          UserError: if ``number`` exceeds the stored images, or no stored caption is near a prompt at all.
        """
        if number > (stored := int(self.shown.sum())):
            raise UserError(f"{number} images are to be chosen by their captions, {stored} are stored")
        chosen = {}
        for prompt in set(prompts):
            score = self.cosine(prompt)
            if not score.any():
                raise UserError(f"no stored caption has a word of the prompt {prompt!r}; draw it with another --method")
            chosen[prompt] = np.argsort(np.where(self.shown, -score, np.inf), kind="stable")[:number].astype(np.int32)
        return np.stack([chosen[prompt] for prompt in prompts])


class TermIndex(CaptionIndex):
    """An index from terms to stored captions, in memory; it takes about four bytes per term of each caption."""

    def __init__(self, captions: Sequence[str], shown: Bool[np.ndarray, " n"] | None = None):
        super().__init__(len(captions), shown)
        images: dict[str, list[int]] = {}
        for image, caption in enumerate(captions):
            for term in terms(caption) if self.shown[image] else ():
                images.setdefault(term, []).append(image)
        self._images = {term: np.asarray(found, np.int32) for term, found in images.items()}
        self._weights = {term: float(np.log(1 + self.shown.sum() / len(found))) for term, found in images.items()}
        squares = np.zeros(len(captions))
        for term, found in self._images.items():
            squares[found] += self._weights[term] ** 2
        self._norms = np.sqrt(np.maximum(squares, 1e-12))

    def cosine(self, prompt: str) -> Float[np.ndarray, " n"]:
        """Returns the cosine of every stored caption with the known terms of a prompt; 0 without a common term."""
        score, asked = np.zeros(self._count), sorted(terms(prompt) & self._images.keys())
        for term in asked:
            score[self._images[term]] += self._weights[term] ** 2
        square = sum(self._weights[term] ** 2 for term in asked)
        return score / self._norms / max(square, 1e-12) ** 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LimitedRetriever:
    """Exact ``interfaces.Retriever`` that searches different images for each prompt; make one with ``create``.

    With B prompts and n contexts, the first n / B contexts belong to the first prompt, and so on.

    Attributes:
      local: one ``DenseRetriever`` per prompt, stacked: every leaf has a leading axis B.
      rows: int32 [B, P], the stored row of each of the P patches of a prompt.
    """

    local: Any
    rows: Any

    @classmethod
    def create(cls, store: Datastore, images: Int[np.ndarray, "B M"], kind: str, k: int) -> "LimitedRetriever":
        """Returns a retriever over M images of the store per prompt.

        Args:
          store: the store that holds the images.
          images: numbers of the images, one row per prompt.
          kind: the kind of key, one of ``KEY_KINDS``.
          k: neighbours per query; at most the number of patches of M images.

        Raises:
          UserError: if k is larger, or the store does not hold such keys.
        """
        patches = store.num_rows(kind) // store.num_images
        return cls(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_dense(store, chosen, kind, k) for chosen in images)),
            jnp.asarray(rows_of_images(images, patches)),
        )

    @property
    def k(self) -> int:
        return self.local.k

    def search(self, context: Int[Array, "n 4"] | Float[Array, "n E"]) -> Neighbors:
        """Returns the neighbours of n contexts given as code ids, or of n projected states."""
        return self._of_each(context, lambda local, own: local.search(own))

    def _of_each(self, context: Array, search: Callable[[Any, Array], Neighbors]) -> Neighbors:
        """Returns what ``search`` finds for the contexts of each prompt in the images of this prompt."""
        require_own_process()
        prompts, patches = self.rows.shape
        each = len(context) // prompts

        def search_one(own: tuple[Any, Array, Array]) -> Neighbors:
            local, rows, context = own
            found = search(local, context)
            return found._replace(id=jnp.where(found.id >= 0, jnp.take(rows, jnp.maximum(found.id, 0)), -1))

        own = self.local, self.rows, context.reshape(prompts, each, -1)
        together = max(1, min(prompts, SCORE_BYTES // (4 * each * patches)))
        found = jax.lax.map(search_one, own, batch_size=together)
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)


def rows_of_images(images: Int[np.ndarray, "B M"], patches: int) -> Int[np.ndarray, "B P"]:
    """Returns the stored rows of images that have this many patches each."""
    rows = images[:, :, None].astype(np.int64) * patches + np.arange(patches)
    return rows.reshape(len(images), -1).astype(np.int32)


def _dense(store: Datastore, images: Int[np.ndarray, " M"], kind: str, k: int) -> DenseRetriever:
    """Returns the exact search over some images; ids are numbers of the patches among these images."""
    store.require_kind(kind)
    each, grids = KEY_KINDS[kind], store.codes[images].astype(np.int32)
    values = grids.reshape(len(grids), -1)[:, each.positions(store.settings.grid)].reshape(-1)
    keys = KeysOfRows(each, store.records(each.file)[images], store.table(kind), 0, len(values))
    return DenseRetriever.of(Patches(keys, values, each), store.table(kind), k, "int8" if each.in_bytes else "float32")
