"""Search on the device that looks at every entry: blocks of scores, and a running top-k.

Queries and keys are four parts of unit norm each, so ‖q − k‖² = 8 − 2 q·k and no norm table is needed. What is
held of an entry (``retrieval.patches``) is its ``storage``:

  codes     4 code ids, 8 bytes: the score is a sum of four looked-up numbers. Kind "codebook" alone.
  float32   the key, 128 bytes.
  bfloat16  the key, 64 bytes.
  int8      the key, 32 bytes. Kind "codebook" alone: of rounded latents too few of the nearest are found.

Scores are approximate, and how they are rounded depends on the batch. So more than k entries are kept by their scores,
and those are ranked by distances that are the same in every batch (``ops.distances``): from code ids where they are
held, else from the key as it is held. An answer is taken where the scores' error cannot have hidden a nearer entry;
where it can, more entries are kept, and at last all are compared. All storages of kind "codebook" answer alike.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.ops.distances import score_error, squared_distances
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.patches import Patches
from arrag_jax.retrieval.ranking import lay_out, unless

SCORE_BYTES = 64 * 2**20  # most bytes that one block's [B, n] scores may take
COMPARE_BYTES = 4 * 2**20  # most bytes of keys that are compared with at once; more would slow down what never compares
CHUNK = 32  # neighbouring scores whose best stands for them in the first stage of the top-k
TPU_RECALL = 0.99  # expected recall of a block's approx_max_k
STORAGES = ("codes", "float32", "bfloat16", "int8")
WIDER = 8  # how many times more entries are kept where rounded keys leave too few beyond doubt
STEPS = 127  # int8 holds a number x of a unit vector as round(127 x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseRetriever:
    """``interfaces.Retriever`` without an index; make one with ``create`` or ``of``.

    Equal distances are ordered by stored row: where more than k stored patches share the k-th distance, those of lowest
    row are returned. On TPUs a block's top-k is ``approx_max_k`` (recall ``TPU_RECALL``); elsewhere it is exact.

    Attributes:
      keys: [U, E] in the storage's type; None where code ids alone are held.
      codes: int [N], the code each stored patch offers, entry by entry; -1 at an empty row, never found.
      codebook: float32 [V, C], rows of unit norm; embeds the queries.
      contexts: uint16 [U, 4], code ids of every entry; None when unfolded.
      starts: int32 [U + 1], where in ``codes`` each entry begins; None when unfolded. An entry without patches is
        never found.
      rows: int32 [N], stored row of each patch; None when unfolded.
      k: neighbours a query.
      score_bytes: most bytes that the scores of one block may take.
    """

    keys: Any  # leaves go untyped: jax also builds this pytree with other things in their place
    codes: Any
    codebook: Any
    k: int = dataclasses.field(metadata={"static": True})
    score_bytes: int = dataclasses.field(default=SCORE_BYTES, metadata={"static": True})
    contexts: Any = None
    starts: Any = None
    rows: Any = None

    @classmethod
    def create(
        cls,
        keys: Float[np.ndarray | Array, "N E"],
        codes: Int[np.ndarray | Array, " N"],
        codebook: Float[np.ndarray | Array, "V C"],
        k: int,
        score_bytes: int = SCORE_BYTES,
    ) -> "DenseRetriever":
        """Keys as they are, unfolded, in float32; puts the arrays on the default device.

        Raises:
          UserError: k is not in 1..N.
        """
        return cls.of(Patches(np.asarray(keys), np.asarray(codes)), codebook, k, "float32", score_bytes)

    @classmethod
    def of(
        cls,
        patches: Patches,
        codebook: Float[np.ndarray | Array, "V C"],
        k: int,
        storage: str = "float32",
        score_bytes: int = SCORE_BYTES,
    ) -> "DenseRetriever":
        """A search over patches; puts the arrays on the default device.

        Args:
          storage: one of ``STORAGES``.

        Raises:
          UserError: k is not in 1..N, or the storage is unknown or not to be had of these patches.
        """
        require_k(k, len(patches.codes))
        leaves = jax.tree.map(jnp.asarray, leaves_of(patches, storage))
        return cls(codebook=jnp.asarray(codebook, jnp.float32), k=k, score_bytes=score_bytes, **leaves)

    def with_k(self, k: int) -> "DenseRetriever":
        """The same search for another number of neighbours; errors as ``create``."""
        require_k(k, len(self.codes))
        return dataclasses.replace(self, k=k)

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids; see ``interfaces.Retriever``."""
        require_own_process()
        query = jnp.take(self.codebook, jnp.maximum(context, 0), axis=0)
        complete, scores_of, error = (context >= 0).all(1), self._scores(query), self._score_error(query)
        widths = sorted({min(self._entries, width) for width in self._widths})

        def nearest(width: int, once: Array | int = 1) -> tuple[Neighbors, Array]:
            score, entry = self._best_scores(scores_of, len(context), width, once)
            found = self._ranked(query, jnp.where(complete[:, None] & ~jnp.isneginf(score), entry, self._entries))
            if width == self._entries:
                return found, complete | True
            # no entry that was left out is nearer than this
            bound = self._distance_of(score.min(1)) - error
            return found, ~complete | jnp.isneginf(score.min(1)) | (found.distance[:, -1] < bound)

        found, sure = nearest(widths[0])
        for width in widths[1:]:
            found, sure = unless(sure, (found, sure), lambda _, once, width=width: nearest(width, once))
        if widths[-1] == self._entries:
            return found
        compare = functools.partial(self._compare, query, complete, scores_of)
        return unless(sure, found, lambda found, once: compare(found.distance[:, -1] + error, once))

    @property
    def _entries(self) -> int:
        """U."""
        return len(self.contexts if self.keys is None else self.keys)

    @property
    def _widths(self) -> tuple[int, ...]:
        """How many entries are kept by their scores: at first, and where these do not suffice."""
        if self.keys is None or self.keys.dtype == jnp.float32:
            return (self.k + max(16, self.k // 16),)
        width = self.k + max(64, self.k // 4)
        return width, WIDER * width

    def _best_scores(
        self, scores_of: Callable[[Array, int], Array], batch: int, kept: int, once: Array | int
    ) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
        """The largest scores and their entries; -inf where there are fewer."""
        entries = self._entries
        block = min(entries, max(1, self.score_bytes // (4 * batch)))

        def search_block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * block, entries - block)  # the last block may overlap the one before it
            new = (start + jnp.arange(block) >= i * block) & self._held(start, block)
            score, place = _top_k(jnp.where(new[None], scores_of(start, block), -jnp.inf), min(kept, block))
            score, entry = (jnp.concatenate(x, 1) for x in zip(best, (score, place + start), strict=True))
            score, order = jax.lax.top_k(score, kept)
            return score, jnp.take_along_axis(entry, order, 1)

        none = jnp.full((batch, kept), -jnp.inf), jnp.zeros((batch, kept), jnp.int32)
        return jax.lax.fori_loop(0, once * -(-entries // block), search_block, none)

    def _ranked(self, query: Float[Array, "B 4 C"], entry: Int[Array, "B n"]) -> Neighbors:
        """The first k patches of some entries; U in empty slots."""
        entry = jnp.sort(entry)  # of equal distances the top-k takes the first
        flat = query.reshape(len(query), 1, -1)
        held = jnp.minimum(entry, self._entries - 1)
        distance = jnp.where(entry < self._entries, squared_distances(flat, self._keys_of(held)), jnp.inf)
        distance, order = jax.lax.top_k(-distance, min(self.k, entry.shape[1]))
        entry = jnp.where(jnp.isneginf(distance), -1, jnp.take_along_axis(entry, order, 1))
        return lay_out(entry, -distance, self.k, self.codes, self.starts, self.rows)

    def _compare(
        self,
        query: Float[Array, "B 4 C"],
        complete: Bool[Array, " B"],
        scores_of: Callable[[Array, int], Array],
        limit: Float[Array, " B"],
        once: Int[Array, ""],
    ) -> Neighbors:
        """Neighbours by the distances of all entries whose scores are not beyond a limit."""
        entries, flat, k = self._entries, query.reshape(len(query), 1, -1), min(self.k, self._entries)
        block = min(entries, max(1, min(self.score_bytes, COMPARE_BYTES) // (4 * flat.size)))

        def compare_block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * block, entries - block)
            entry = start + jnp.arange(block)
            new = (entry >= i * block) & self._held(start, block)
            near = new[None] & complete[:, None] & (self._distance_of(scores_of(start, block)) <= limit[:, None])

            def compared(best: tuple[Array, Array]) -> tuple[Array, Array]:
                distance = jnp.where(near, squared_distances(flat, self._keys_of(entry)[None]), jnp.inf)
                score, place = exact_top_k(-distance, min(k, block))
                # earlier blocks come first, so that equal distances stay ordered by entry
                score, found = (jnp.concatenate(x, 1) for x in zip(best, (score, place + start), strict=True))
                score, order = jax.lax.top_k(score, k)
                return score, jnp.take_along_axis(found, order, 1)

            return jax.lax.cond(near.any(), compared, lambda best: best, best)

        none = jnp.full((len(query), k), -jnp.inf), jnp.zeros((len(query), k), jnp.int32)
        score, entry = jax.lax.fori_loop(0, once * -(-entries // block), compare_block, none)
        entry = jnp.where(jnp.isneginf(score), -1, entry)
        return lay_out(entry, -score, self.k, self.codes, self.starts, self.rows)

    def _scores(self, query: Float[Array, "B 4 C"]) -> Callable[[Array, int], Float[Array, "B n"]]:
        """From the first entry and the size of a block to its scores: the nearer, the larger."""
        flat = query.reshape(len(query), -1)

        def looked_up(start: Array, block: int) -> Array:
            contexts = jax.lax.dynamic_slice_in_dim(self.contexts, start, block).astype(jnp.int32)
            # One query after the other: fused into the top-k, looking up is a hundred times slower on a CPU.
            return jax.lax.map(
                lambda parts: -sum(jnp.take(parts[i], contexts[:, i], mode="clip") for i in range(4)), table
            )

        def multiplied(start: Array, block: int) -> Array:
            keys = jax.lax.dynamic_slice_in_dim(self.keys, start, block)
            # full precision: at a GPU's or TPU's default, float32 scores would be wrong in the third digit
            kinds = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": sums}
            return jnp.einsum("be,ne->bn", asked, keys, **kinds).astype(jnp.float32)

        if self.keys is None:
            away = query[:, :, None] - self.codebook[None, None]
            table = (away * away).sum(-1)
            return looked_up
        asked, sums = _stored(flat, self.keys.dtype), jnp.int32 if self.keys.dtype == jnp.int8 else jnp.float32
        return multiplied

    def _held(self, start: Array, block: int) -> Bool[Array, " n"]:
        """Which entries of a block are not empty."""
        if self.starts is None:
            return jax.lax.dynamic_slice_in_dim(self.codes, start, block) >= 0
        return jnp.diff(jax.lax.dynamic_slice_in_dim(self.starts, start, block + 1)) > 0

    def _keys_of(self, entry: Int[Array, "*dims"]) -> Float[Array, "*dims E"]:
        """Keys of entries, as exactly as what is held of them allows."""
        if self.contexts is None:
            return jnp.take(self.keys, entry, axis=0).astype(jnp.float32)
        return jnp.take(self.codebook, jnp.take(self.contexts, entry, axis=0), axis=0).reshape(*entry.shape, -1)

    def _distance_of(self, score: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """The distances that scores stand for."""
        if self.keys is None:
            return -score
        return 8 - score * (2 / STEPS**2 if self.keys.dtype == jnp.int8 else 2)

    def _score_error(self, query: Float[Array, "B 4 C"]) -> Float[Array, " B"] | float:
        """Most by which ``_distance_of`` scores differs from distances."""
        numbers = 4 * query.shape[2]
        if self.keys is None or self.keys.dtype == jnp.float32:
            return score_error(numbers)
        held = lambda x: _stored(x, self.keys.dtype).astype(jnp.float32) / scale  # noqa: E731
        scale = STEPS if self.keys.dtype == jnp.int8 else 1
        if self.contexts is None:  # bfloat16 keeps eight bits: numbers and norms are off by 2^-9 of themselves at most
            away = jnp.sqrt(((query - held(query)) ** 2).sum(2)).sum(1)
            return 2.01 * away + 4.01 * 2.0**-8 + score_error(numbers)
        product = functools.partial(jnp.einsum, "bpc,vc->bpv", precision=jax.lax.Precision.HIGHEST)
        lost = product(query, self.codebook) - product(held(query), held(self.codebook))
        return 2 * jnp.abs(lost).max(2).sum(1) + 2 * score_error(numbers)


def leaves_of(patches: Patches, storage: str) -> dict[str, Any]:
    """The arrays of ``DenseRetriever`` that depend on the patches, on the host; None where it holds none.

    Raises:
      UserError: as ``DenseRetriever.of``.
    """
    folded = patches.contexts is not None
    if storage not in STORAGES or (storage in ("codes", "int8") and not folded):
        known = ", ".join(STORAGES)
        raise UserError(f"storage={storage!r}: choose one of {known} (codes and int8 for kind 'codebook' alone)")
    keys = None if storage == "codes" else _stored(np.asarray(patches.keys[:], np.float32), jnp.dtype(storage))
    codes = patches.codes if folded else np.asarray(patches.codes, np.int32)
    contexts, starts, rows = patches.contexts, patches.starts, patches.rows
    return {"keys": keys, "codes": codes, "contexts": contexts, "starts": starts, "rows": rows}


def _stored(vectors: Any, dtype: jnp.dtype) -> Any:
    """Numbers of unit vectors in a storage's type."""
    return (vectors * STEPS).round().astype(dtype) if dtype == jnp.int8 else vectors.astype(dtype)


def require_k(k: int, rows: int) -> None:
    """Raises UserError unless k neighbours can be had of this many stored patches."""
    if not 1 <= k <= rows:
        raise UserError(f"k={k} neighbours asked of {rows} stored patches; choose k between 1 and {rows}")


def _top_k(scores: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """The k largest scores and their places, by the fastest means of the platform it is compiled for."""
    return jax.lax.platform_dependent(
        scores,
        tpu=lambda x: tuple(jax.lax.approx_max_k(x, k, recall_target=TPU_RECALL)),
        default=lambda x: exact_top_k(x, k),
    )


def exact_top_k(scores: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """``lax.top_k`` in two stages, equal scores by lower place; 3 to 9 times its speed on a CPU at n = 1e6.

    Of chunks of ``CHUNK`` scores, the k with the largest maxima hold all k largest scores: a score
    outside them is beaten by the maximum of each. Chunks are then searched in the order of their places.
    """
    batch, n = scores.shape
    if n <= CHUNK * k:
        return tuple(jax.lax.top_k(scores, k))
    chunks = jnp.pad(scores, ((0, 0), (0, -n % CHUNK)), constant_values=-jnp.inf).reshape(batch, -1, CHUNK)
    best = jnp.sort(jax.lax.top_k(chunks.max(2), k)[1], 1)
    members = jnp.take_along_axis(chunks, best[:, :, None], 1).reshape(batch, -1)
    score, place = jax.lax.top_k(members, k)
    return score, jnp.take_along_axis(best, place // CHUNK, 1) * CHUNK + place % CHUNK
