"""Dense search on the device: computes blocks of scores of all keys, and a running top-k.

The device holds one item per unique context (``retrieval.patches``), or per patch if contexts do not determine keys.
The format of an item is the ``storage``, one of those of its kind of key (``ops.keys``):

  codes     4 code ids, 8 bytes: the score is a sum of four looked-up numbers.
  float32   the key, 128 bytes.
  bfloat16  the key, 64 bytes.
  int8      the key, 32 bytes.

For hidden keys, int8 holds the stored bytes, which is exact.

Scores are approximate, and their rounding depends on the batch. The search therefore keeps more than k contexts by
score, and ranks these by distances that are equal in every batch (``ops.distances``). Distances are computed from code
ids if the search holds them, else from the stored key. The answer is final if the error of the scores cannot have
hidden a nearer context. Otherwise the search keeps more contexts, and in the end compares all of them. All storages
that hold code ids return the same answers.
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
from arrag_jax.ops.distances import squared_distances
from arrag_jax.ops.keys.kind import KeyKind
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.patches import KeysOfRows, Patches
from arrag_jax.retrieval.ranking import lay_out, unless

SCORE_BYTES = 64 * 2**20  # size limit of one block's [B, n] scores
DECODED_BYTES = 4 * 2**20  # size limit of the keys that are decoded at once
COMPARE_BYTES = 4 * 2**20  # size limit of the keys compared at once; more slows down searches that never compare
CHUNK = 32  # neighbouring scores that the first stage of the top-k represents by their maximum
TPU_RECALL = 0.99  # expected recall of a block's approx_max_k
WIDER = 8  # factor by which more contexts are kept if rounded keys leave too few certain ones
STEPS = 127  # int8 holds a number x as round(127 x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseRetriever:
    """``interfaces.Retriever`` without an index; make one with ``create`` or ``of``.

    Equal distances are ordered by stored row: if more than k stored patches share the k-th distance, those with the
    lowest rows are returned. On TPUs a block's top-k is ``approx_max_k`` (recall ``TPU_RECALL``), elsewhere exact.

    Attributes:
      keys: [U, E] in the storage's type; None if only code ids are held.
      codes: int [N], the next code of each stored patch, grouped by context; -1 marks an empty row, which is never
        found.
      table: the table of the kind of key (``ops.keys.kind``), float32; for keys of the context the codebook [V, C].
      contexts: uint16 [U, 4], code ids of every unique context; None if each patch has its own key.
      starts: int32 [U + 1], where the posting list of each context begins in ``codes``; None if ``contexts`` is. A
        context with an empty list is never found.
      rows: int32 [N], the posting lists: stored row of each patch; None if ``contexts`` is.
      kind: the kind of key.
      k: neighbours per query.
      score_bytes: size limit of the scores of one block.
    """

    keys: Any  # leaves have no types, because JAX also builds this pytree with other objects as leaves
    codes: Any
    table: Any
    kind: KeyKind = dataclasses.field(metadata={"static": True})
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
        """Returns a search over the given keys, one per patch, in float32; puts the arrays on the default device.

        Raises:
          UserError: if k is not in 1..N.
        """
        return cls.of(Patches(np.asarray(keys), np.asarray(codes)), codebook, k, "float32", score_bytes)

    @classmethod
    def of(
        cls,
        patches: Patches,
        table: Float[np.ndarray | Array, "n_table C"],
        k: int,
        storage: str = "float32",
        score_bytes: int = SCORE_BYTES,
    ) -> "DenseRetriever":
        """Returns a search over patches; puts the arrays on the default device.

        Args:
          storage: one of the ``storages`` of the patches' kind of key.

        Raises:
          UserError: if k is not in 1..N, or the kind of key has no such storage.
        """
        require_k(k, len(patches.codes))
        leaves = jax.tree.map(jnp.asarray, leaves_of(patches, storage))
        static: dict[str, Any] = {"kind": patches.kind, "k": k, "score_bytes": score_bytes}
        return cls(table=jnp.asarray(table, jnp.float32), **static, **leaves)

    def with_k(self, k: int) -> "DenseRetriever":
        """Returns the same search for another number of neighbours; errors as in ``create``."""
        require_k(k, len(self.codes))
        return dataclasses.replace(self, k=k)

    def search(self, context: Int[Array, "B 4"] | Float[Array, "B E"]) -> Neighbors:
        """Returns the neighbours of B contexts given as code ids, or of B projected states (``retrieval.states``)."""
        require_own_process()
        query, complete = self.kind.query(self.table, context), self.kind.complete(context)
        scores_of, error = self._scores(query), functools.partial(self._score_error, query)
        widths = sorted({min(self._num_unique, width) for width in self._widths})

        def nearest(width: int, once: Array | int = 1) -> tuple[Neighbors, Array]:
            score, unique = self._best_scores(scores_of, len(context), width, once)
            found = self._ranked(query, jnp.where(complete[:, None] & ~jnp.isneginf(score), unique, self._num_unique))
            if width == self._num_unique:
                return found, complete | True
            # no context that was not kept is nearer than this
            farthest = self._distance_of(score.min(1))
            bound = farthest - error(farthest)
            return found, ~complete | jnp.isneginf(score.min(1)) | (found.distance[:, -1] < bound)

        found, sure = nearest(widths[0])
        for width in widths[1:]:
            wider = functools.partial(lambda width, _, once: nearest(width, once), width)
            found, sure = unless(sure, (found, sure), wider)
        if widths[-1] == self._num_unique:
            return found
        compare = functools.partial(self._compare, query, complete, scores_of)

        def compared(found: Neighbors, once: Int[Array, ""]) -> Neighbors:
            limit = jnp.asarray(found.distance[:, -1])
            return compare(limit + error(limit), once)

        return unless(sure, found, compared)

    @property
    def _num_unique(self) -> int:
        """U, the number of unique contexts (or of keys)."""
        return len(self.contexts if self.keys is None else self.keys)

    @property
    def _in_bytes(self) -> bool:  # bytes are decoded before they are compared
        return self.kind.in_bytes and self.keys.dtype == jnp.int8

    @property
    def _most_keys(self) -> int:
        """Number of keys that are scored at once: decoded ones take memory, others none."""
        return max(1, DECODED_BYTES // (4 * self.keys.shape[1])) if self._in_bytes else len(self.codes)

    @property
    def _scale(self) -> int:
        """The factor by which the keys are scaled when they are scored."""
        return STEPS if self.keys.dtype == jnp.int8 and not self._in_bytes else 1

    @property
    def _is_exact(self) -> bool:
        """Whether keys and queries are scored in float32."""
        return self.keys is None or self.keys.dtype == jnp.float32 or self._in_bytes

    @property
    def _widths(self) -> tuple[int, ...]:
        """How many contexts are kept by score: in the first pass, and in the second if the first is not enough."""
        if self._is_exact:
            return (self.k + max(16, self.k // 16),)
        width = self.k + max(64, self.k // 4)
        return width, WIDER * width

    def _best_scores(
        self, scores_of: Callable[[Array, int], Array], batch: int, kept: int, once: Array | int
    ) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
        """Returns the ``kept`` largest scores and their contexts; -inf in empty slots."""
        number = self._num_unique
        block = min(number, self._most_keys, max(1, self.score_bytes // (4 * batch)))

        def search_block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * block, number - block)  # the last block may overlap the one before it
            new = (start + jnp.arange(block) >= i * block) & self._held(start, block)
            score, place = _top_k(jnp.where(new[None], scores_of(start, block), -jnp.inf), min(kept, block))
            score, unique = (jnp.concatenate(x, 1) for x in zip(best, (score, place + start), strict=True))
            score, order = jax.lax.top_k(score, kept)
            return score, jnp.take_along_axis(unique, order, 1)

        none = jnp.full((batch, kept), -jnp.inf), jnp.zeros((batch, kept), jnp.int32)
        return jax.lax.fori_loop(0, once * -(-number // block), search_block, none)

    def _ranked(self, query: Float[Array, "B E"], unique: Int[Array, "B n"]) -> Neighbors:
        """Returns the k nearest patches of the given contexts; ``unique`` holds U in empty slots."""
        unique = jnp.sort(unique)  # because the top-k takes the first of equal distances
        held = jnp.minimum(unique, self._num_unique - 1)
        distance = squared_distances(query[:, None], self._keys_of(held))
        distance = jnp.where(unique < self._num_unique, distance, jnp.inf)
        distance, order = jax.lax.top_k(-distance, min(self.k, unique.shape[1]))
        unique = jnp.where(jnp.isneginf(distance), -1, jnp.take_along_axis(unique, order, 1))
        return lay_out(unique, -distance, self.k, self.codes, self.starts, self.rows)

    def _compare(
        self,
        query: Float[Array, "B E"],
        complete: Bool[Array, " B"],
        scores_of: Callable[[Array, int], Array],
        limit: Float[Array, " B"],
        once: Int[Array, ""],
    ) -> Neighbors:
        """Returns the neighbours by exact distance among the contexts with an approximate distance up to ``limit``."""
        number, k = self._num_unique, min(self.k, self._num_unique)
        block = min(number, self._most_keys, max(1, min(self.score_bytes, COMPARE_BYTES) // (4 * query.size)))

        def compare_block(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * block, number - block)
            unique = start + jnp.arange(block)
            new = (unique >= i * block) & self._held(start, block)
            near = new[None] & complete[:, None] & (self._distance_of(scores_of(start, block)) <= limit[:, None])

            def compared(best: tuple[Array, Array]) -> tuple[Array, Array]:
                distance = squared_distances(query[:, None], self._keys_of(unique)[None])
                distance = jnp.where(near, distance, jnp.inf)
                score, place = exact_top_k(-distance, min(k, block))
                # earlier blocks come first, so that equal distances remain ordered by context
                score, found = (jnp.concatenate(x, 1) for x in zip(best, (score, place + start), strict=True))
                score, order = jax.lax.top_k(score, k)
                return score, jnp.take_along_axis(found, order, 1)

            return jax.lax.cond(near.any(), compared, lambda best: best, best)

        none = jnp.full((len(query), k), -jnp.inf), jnp.zeros((len(query), k), jnp.int32)
        score, unique = jax.lax.fori_loop(0, once * -(-number // block), compare_block, none)
        unique = jnp.where(jnp.isneginf(score), -1, unique)
        return lay_out(unique, -score, self.k, self.codes, self.starts, self.rows)

    def _scores(self, query: Float[Array, "B E"]) -> Callable[[Array, int], Float[Array, "B n"]]:
        """Returns a function from (first context, size) of a block to its scores; the nearest has the largest."""

        def looked_up(start: Array, block: int) -> Array:
            contexts = jax.lax.dynamic_slice_in_dim(self.contexts, start, block).astype(jnp.int32)
            # One query at a time, because a lookup fused into the top-k is a hundred times slower on a CPU.
            return jax.lax.map(
                lambda parts: -sum(jnp.take(x, contexts[:, i], mode="clip") for i, x in enumerate(parts)), table
            )

        def multiplied(start: Array, block: int) -> Array:
            keys = jax.lax.dynamic_slice_in_dim(self.keys, start, block)
            return self.kind.scores(requested, self.kind.decoded(keys, self.table) if self._in_bytes else keys)

        if self.keys is None:
            table = ((query.reshape(len(query), -1, 1, self.table.shape[1]) - self.table[None, None]) ** 2).sum(-1)
            return looked_up
        requested = query if self._in_bytes else _stored(query, self.keys.dtype)
        return multiplied

    def _held(self, start: Array, block: int) -> Bool[Array, " n"]:
        """Returns which contexts of a block have a patch."""
        if self.starts is None:
            return jax.lax.dynamic_slice_in_dim(self.codes, start, block) >= 0
        return jnp.diff(jax.lax.dynamic_slice_in_dim(self.starts, start, block + 1)) > 0

    def _keys_of(self, unique: Int[Array, "*dims"]) -> Float[Array, "*dims E"]:
        """Returns the keys of contexts in float32, as exact as the storage allows."""
        if self._in_bytes:
            return self.kind.decoded(jnp.take(self.keys, unique, axis=0), self.table)
        if self.contexts is None:
            return jnp.take(self.keys, unique, axis=0).astype(jnp.float32) / self._scale
        return self.kind.query(self.table, jnp.take(self.contexts, unique, axis=0))

    def _distance_of(self, score: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """Converts scores to distances."""
        if self.keys is None:
            return -score
        return self.kind.distance(score * (1 / self._scale**2))

    def _score_error(self, query: Float[Array, "B E"], distance: Float[Array, " B"]) -> Float[Array, " B"]:
        """Returns the bound of the error of ``_distance_of`` scores, for keys up to these distances."""
        if self._is_exact:
            return self.kind.score_error(query, distance)

        def rounded(numbers: Array) -> Array:
            return _stored(numbers, self.keys.dtype).astype(jnp.float32) / self._scale

        return self.kind.rounding_error(query, rounded, None if self.contexts is None else self.table)


def leaves_of(patches: Patches, storage: str) -> dict[str, Any]:
    """Returns the host arrays of ``DenseRetriever`` that depend on the patches; None for those it does not hold.

    Raises:
      UserError: as in ``DenseRetriever.of``.
    """
    patches.kind.require_storage(storage)
    keys: np.ndarray | None
    if storage == "int8" and isinstance(patches.keys, KeysOfRows) and patches.kind.in_bytes:
        keys = patches.keys.held()
    else:
        keys = None if storage == "codes" else _stored(np.asarray(patches.keys[:], np.float32), jnp.dtype(storage))
    codes = patches.codes if patches.starts is not None else np.asarray(patches.codes, np.int32)
    contexts, starts, rows = patches.contexts, patches.starts, patches.rows
    return {"keys": keys, "codes": codes, "contexts": contexts, "starts": starts, "rows": rows}


def _stored(vectors: Any, dtype: jnp.dtype) -> Any:
    """Converts numbers between -1 and 1 to a storage's type."""
    return (vectors * STEPS).round().astype(dtype) if dtype == jnp.int8 else vectors.astype(dtype)


def require_k(k: int, rows: int) -> None:
    """Raises UserError unless k is in 1..``rows``, the number of stored patches."""
    if not 1 <= k <= rows:
        raise UserError(f"k={k} neighbours were requested from {rows} stored patches; choose k between 1 and {rows}")


def _top_k(scores: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Returns the k largest scores and their indices, by the fastest method of the target platform."""
    return jax.lax.platform_dependent(
        scores,
        tpu=lambda x: tuple(jax.lax.approx_max_k(x, k, recall_target=TPU_RECALL)),
        default=lambda x: exact_top_k(x, k),
    )


def exact_top_k(scores: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Returns the same as ``lax.top_k``, in two stages; it is 3 to 9 times as fast on a CPU at n = 1e6.

    Equal scores are ordered by index. The scores are split into chunks of ``CHUNK``. The k chunks with the largest
    maxima contain all k largest scores, because each of their maxima is at least any score outside them. These chunks
    are then searched in the order of their indices.
    """
    batch, n = scores.shape
    if n <= CHUNK * k:
        score, place = jax.lax.top_k(scores, k)
        return score, place
    chunks = jnp.pad(scores, ((0, 0), (0, -n % CHUNK)), constant_values=-jnp.inf).reshape(batch, -1, CHUNK)
    best = jnp.sort(jax.lax.top_k(chunks.max(2), k)[1], 1)
    members = jnp.take_along_axis(chunks, best[:, :, None], 1).reshape(batch, -1)
    score, place = jax.lax.top_k(members, k)
    return score, jnp.take_along_axis(best, place // CHUNK, 1) * CHUNK + place % CHUNK
