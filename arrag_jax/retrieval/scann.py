"""Approximate search on the host: ScaNN behind ``ops.host.host_call``.

What ScaNN does differently is put right here, and nowhere else knows of it: it gives ids as uint32, pads
misses with id 0 and distance NaN, returns fewer columns than asked, and orders equal distances anyhow.

An index is a k-means tree; the members of the leaves nearest to a query are scored in float32, and in squared
L2, so that distances are exact and only neighbours in other leaves are missed. Keys have 32 numbers, so few
that asymmetric hashing (with reordering) loses on both sides: lower recall in the same time, longer builds.
Trees for the dot product find less on keys of equal norm.

The callback's body is numpy and ScaNN alone: jax.numpy inside a host callback hangs on CPU.
"""

import dataclasses
import functools
import itertools
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.ops.host import host_call
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.dense import require_k

TRAINING_KEYS = 200_000  # most keys that k-means sees
QUERIES_A_THREAD = 8  # smaller shares cost more in hand-over than they win


BY_RULE = ScannOptions()
EXHAUSTIVE = ScannOptions(exhaustive_below=2**62)  # exact results, whatever N is


def num_leaves(rows: int, options: ScannOptions) -> int:
    """Leaves of the tree over so many rows; 0 = no tree, every key is scored."""
    if rows < options.exhaustive_below:
        return 0
    return min(options.leaves or round(2 * math.sqrt(rows)), rows)


def num_leaves_to_search(rows: int, options: ScannOptions) -> int:
    """How many of them a search looks into; at least 1."""
    leaves = num_leaves(rows, options)
    return max(1, min(options.leaves_to_search or max(25, leaves // 100), leaves))


def import_scann() -> ModuleType:
    """ScaNN's numpy interface.

    Raises:
      UserError: ScaNN can't be imported here (it has wheels for Linux alone).
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(f"ScaNN cannot be imported here ({error}); use the dense search: search='dense'") from error
    return scann_ops_pybind


def build_searcher(keys: Float[np.ndarray, "N E"], options: ScannOptions) -> Any:
    """A ScaNN searcher over the keys. Builds with a tree are not deterministic (a random start of k-means)."""
    leaves = num_leaves(len(keys), options)
    # num_neighbors is only a default, which every search overrides
    builder = import_scann().builder(np.ascontiguousarray(keys, np.float32), 10, "squared_l2")
    if leaves:
        sample = min(len(keys), TRAINING_KEYS)
        searched = num_leaves_to_search(len(keys), options)
        builder = builder.tree(leaves, searched, training_sample_size=sample, quantize_centroids=True)
    return builder.score_brute_force().build()


def shard_bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """First row and end of each shard: contiguous, in order, sizes differing by one at most."""
    return list(itertools.pairwise(rows * shard // shards for shard in range(shards + 1)))


class HostSearch:
    """The searchers of one or more shards and what turns their answers into ``Neighbors``.

    Compared by identity, so that it can be a static part of a jit argument.
    """

    def __init__(
        self,
        searchers: dict[int, Any],
        bounds: list[tuple[int, int]],
        codes: Int[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
        k: int,
        options: ScannOptions,
    ):
        """
        Args:
          searchers: shard → its searcher; a process needs only the shards of its own devices.
          bounds: first row and end of every shard.
          codes: the code each stored patch offers, all shards.
          codebook: float32, rows of unit norm; embeds the queries.
          k: neighbours a query.
          options: how to search.
        """
        require_k(k, len(codes))
        self.searchers, self.bounds, self.k, self.options = searchers, bounds, k, options
        self.codes, self.codebook = np.asarray(codes, np.int32), np.asarray(codebook, np.float32)

    def with_k(self, k: int) -> "HostSearch":
        """The same searchers for another number of neighbours; errors as the constructor."""
        return HostSearch(self.searchers, self.bounds, self.codes, self.codebook, k, self.options)

    def search(
        self, context: Int[Array | np.ndarray, "*batch 4"], shard: Int[Array | np.ndarray | np.int32, "*one"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The callback: codes, distances and ids [*batch, K]; ids count from the shard's first row."""
        context, which = np.asarray(context), int(np.asarray(shard).reshape(-1)[0])
        # Contexts repeat (plain grounds), so each is asked for once. No answer is kept for the next call: distances
        # depend on the batch in their last bits, and equal calls shall give equal answers.
        rows, place = np.unique(context.reshape(-1, 4), axis=0, return_inverse=True)
        shape = (*context.shape[:-1], self.k)
        code, distance, id_ = (part[place.reshape(-1)].reshape(shape) for part in self._answer(which, rows))
        return code, distance, id_

    def _answer(self, shard: int, rows: Int[np.ndarray, "n 4"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, distances and ids [n, K] of contexts, from the searcher."""
        first, end = self.bounds[shard]
        code = np.full((len(rows), self.k), -1, np.int32)
        distance, id_ = np.full(code.shape, np.inf, np.float32), code.copy()
        asked = np.flatnonzero((rows >= 0).all(1))
        if len(asked):
            found, away = self._search(shard, self.codebook[rows[asked]].reshape(len(asked), -1))
            hit = ~np.isnan(away)
            columns = found.shape[1]
            id_[asked, :columns] = np.where(hit, found, -1)
            distance[asked, :columns] = np.where(hit, away, np.inf)
            code[asked, :columns] = np.where(hit, self.codes[first:end][np.where(hit, found, 0)], -1)
        return code, distance, id_

    def _search(self, shard: int, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and squared distances [B, ≤ K], nearest first, equal distances by lower id, misses last."""
        first, end = self.bounds[shard]
        found, away = self.searchers[shard].search_batched_parallel(
            query,
            final_num_neighbors=min(self.k, end - first),
            leaves_to_search=num_leaves_to_search(end - first, self.options),
            batch_size=QUERIES_A_THREAD,
        )
        found, away = np.asarray(found, np.int32), np.maximum(np.asarray(away, np.float32), 0)
        order = np.lexsort((found, away))  # NaN sorts last
        return np.take_along_axis(found, order, 1), np.take_along_axis(away, order, 1)


def build_host(
    keys: Float[np.ndarray, "N E"],
    codes: Int[np.ndarray, " N"],
    codebook: Float[np.ndarray, "V C"],
    k: int,
    options: ScannOptions = BY_RULE,
    shards: int = 1,
) -> HostSearch:
    """Builds indexes in memory, one a shard; arguments as ``DenseRetriever.create``.

    Raises:
      UserError: k is not in 1..N, or ScaNN can't be imported.
    """
    require_k(k, len(codes))
    bounds = shard_bounds(len(codes), shards)
    searchers = {s: build_searcher(keys[slice(*rows)], options) for s, rows in enumerate(bounds)}
    return HostSearch(searchers, bounds, codes, codebook, k, options)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shard"], meta_fields=["host", "k"])
@dataclasses.dataclass(frozen=True, eq=False)
class ScannRetriever:
    """Approximate ``interfaces.Retriever`` on the host; exact with ``EXHAUSTIVE``. Make one with ``create``.

    Keys of kind "codebook" repeat: where thousands of stored patches have exactly the query's context, all K
    answers are at distance 0 and ScaNN picks any K of them; so comparisons hold up to ties at the K-th distance.

    Attributes:
      shard: which of the host's searchers to ask; int32 scalar, or [S] inside a ``ShardedRetriever``.
      host: the searchers; static, hashed by identity.
      k: neighbours a query.
    """

    shard: Any
    host: HostSearch
    k: int

    @classmethod
    def create(
        cls,
        keys: Float[np.ndarray, "N E"],
        codes: Int[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
        k: int,
        options: ScannOptions = BY_RULE,
    ) -> "ScannRetriever":
        """Builds an index in memory; arguments and errors as ``build_host``."""
        return cls.of(build_host(keys, codes, codebook, k, options))

    @classmethod
    def of(cls, host: HostSearch) -> "ScannRetriever":
        """The retriever of a host search with one shard."""
        return cls(jnp.int32(0), host, host.k)

    def with_k(self, k: int) -> "ScannRetriever":
        """The same search for another number of neighbours; errors as ``create``."""
        return dataclasses.replace(self, host=self.host.with_k(k), k=k)

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids; see ``interfaces.Retriever``."""
        shape = (len(context), self.k)
        result = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32))
        # a callback has no derivative, and none is wanted
        context, shard = jax.lax.stop_gradient((context, self.shard))
        return Neighbors(*host_call(self.host.search, result, context, shard))
