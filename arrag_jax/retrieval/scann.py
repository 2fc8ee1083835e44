"""Approximate search on the host: ScaNN behind ``ops.host.host_call``.

What ScaNN does differently is put right here, and nowhere else knows of it: it gives ids as uint32, pads
misses with id 0 and distance NaN, returns fewer columns than asked, and orders equal distances anyhow.

An index is a k-means tree over unique contexts (``retrieval.patches``); the members of the leaves nearest to a query
are scored, in squared L2. Keys have 32 numbers, so few that asymmetric hashing loses on both sides: lower recall in
the same time, longer builds. Trees for the dot product find less on keys of equal norm. Where contexts hardly repeat,
keys are held as int8. Distances of what ScaNN gives are computed anew in float32, and a bound on its errors tells
when it has to be asked for more. So in both forms distances are exact, equal in every batch, and only neighbours in
leaves that are not searched are missed. A context that has k patches of its own needs no search at all. The
callback's body is numpy and ScaNN alone: jax.numpy inside a host callback hangs on CPU.
"""

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.native_output import hushed
from arrag_jax.ops import handles
from arrag_jax.ops.distances import host_distances
from arrag_jax.ops.host import host_call
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.dense import require_k
from arrag_jax.retrieval.patches import Patches, no_neighbors, one_key_each, packed

TRAINING_KEYS = 200_000  # most keys that k-means sees
QUERIES_A_THREAD = 2  # a single one is not worth its hand-over
SPARE = {4: (16, 0.0), 1: (64, 0.5)}  # contexts requested beyond those expected, and their share, by bytes a number
MORE = 4  # how many times more are requested where these were too few
WORTH = 12  # leaves searched hold at least so many times the contexts requested
FLOAT32_SHARE = 0.25  # up to this share of unique contexts among patches an index holds float32, beyond it int8
BLOCK = 2**16  # keys made at once
EXACT_NUMBERS = 2**18  # numbers whose distances are computed at once: they stay in a core's cache

BY_RULE = ScannOptions()
EXHAUSTIVE = ScannOptions(exhaustive_below=2**62)  # exact results, whatever N is


def num_leaves(unique: int, options: ScannOptions) -> int:
    """Leaves of the tree over so many unique contexts; 0 = no tree, every key is scored."""
    if unique < options.exhaustive_below:
        return 0
    return min(options.leaves or round(2 * math.sqrt(unique)), unique)


def num_leaves_to_search(unique: int, requested: int, options: ScannOptions) -> int:
    """How many of them a search for so many contexts looks into; at least 1."""
    leaves = num_leaves(unique, options)
    enough = -(-WORTH * requested * leaves // unique)
    return max(1, min(options.leaves_to_search or max(25, leaves // 100, enough), leaves))


def bytes_a_number(unique: int, patches: int, options: ScannOptions) -> int:
    """4 (float32) or 1 (int8): what the index holds of every number of a key."""
    if not num_leaves(unique, options):
        return 4  # ScaNN 1.4.2 crashes on int8 without a tree
    return options.bytes_a_number or (4 if unique <= FLOAT32_SHARE * patches else 1)


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


@hushed()
def build_searcher(patches: Patches, options: ScannOptions) -> Any:
    """A ScaNN searcher over the unique contexts; on one kind of machine every build has the same bytes."""
    unique = len(patches.keys)
    keys = np.empty((unique, patches.keys[:1].shape[1]), np.float32)
    for first in range(0, unique, BLOCK):
        keys[first : first + BLOCK] = patches.keys[first : first + BLOCK]
    leaves = num_leaves(unique, options)
    builder = import_scann().builder(keys, 10, "squared_l2")  # 10 is only a default, which every search overrides
    if leaves:
        # ScaNN's random start has no seed, its k-means++ has one; several threads put some keys into any leaf
        means = {"training_sample_size": min(unique, TRAINING_KEYS), "quantize_centroids": True, "random_init": False}
        builder = builder.tree(leaves, num_leaves_to_search(unique, 10, options), **means).set_n_training_threads(1)
    return builder.score_brute_force(quantize=bytes_a_number(unique, len(patches.codes), options) == 1).build()


def shard_bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """First row and end of each shard: contiguous, in order, sizes differing by one at most.

    Raises:
      UserError: fewer rows than shards.
    """
    if rows < shards:
        raise UserError(f"{rows} stored patches cannot be spread over {shards} shards; choose {rows} or fewer")
    return list(itertools.pairwise(rows * shard // shards for shard in range(shards + 1)))


class ShardSearch:
    """One shard's searcher with its patches."""

    def __init__(self, searcher: Any, patches: Patches, options: ScannOptions):
        """
        Args:
          searcher: of ``build_searcher(patches, options)``.
          options: ``leaves_to_search`` may differ from those built with.
        """
        self.searcher, self.patches, self.options = searcher, patches, options
        self.bytes_a_number = bytes_a_number(len(patches.keys), len(patches.codes), options)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys with norms and leaves in both directions, centroids, contexts, rows and codes."""
        unique, numbers = len(self.patches.keys), self.patches.keys[:1].shape[1]
        leaves = num_leaves(unique, self.options)
        each = numbers * self.bytes_a_number + (4 if self.bytes_a_number == 1 else 0) + (8 if leaves else 0)
        return unique * each + 4 * leaves * numbers + self.patches.nbytes

    def search(
        self, context: Int[np.ndarray, "n 4"], query: Float[np.ndarray, "n E"], k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, squared distances and stored rows [n, k] of contexts and their vectors.

        Nearest first; equal distances by stored row.
        """
        unique, rows = len(self.patches.keys), len(self.patches.codes)
        own, count = self.patches.own(context)
        answer = self.patches.lay_out(np.where(count >= k, own, -1)[:, None], np.zeros((len(own), 1), np.float32), k)
        left = np.flatnonzero(count < k)
        requested, (spare, share) = min(k, 2 * k * unique // rows), SPARE[self.bytes_a_number]
        requested += spare + int(share * requested)
        while len(left):
            requested = min(requested, unique)
            found, distance, bound = self._nearest(query[left], requested)
            laid = self.patches.lay_out(found, distance, k)
            for whole, part in zip(answer, laid, strict=True):
                whole[left] = part
            left = left[np.isfinite(bound) & (laid[1][:, -1] >= bound)]
            requested *= MORE
        return answer

    def _nearest(self, query: np.ndarray, requested: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Contexts and exact distances [n, requested], and bounds [n]: no other context of these leaves is nearer."""
        found, near = self.searcher.search_batched_parallel(
            query,
            final_num_neighbors=requested,
            leaves_to_search=num_leaves_to_search(len(self.patches.keys), requested, self.options),
            batch_size=QUERIES_A_THREAD,
        )
        hit = ~np.isnan(near)
        unique = np.where(hit, found, 0).astype(np.int64)
        distance = np.where(hit, self._exact(query, unique), np.inf).astype(np.float32)
        # distances are not negative, so that their bits order as they do; one sort then orders by distance and context
        order = np.sort(distance.view(np.int32).astype(np.int64) << 32 | unique, 1)
        distance = (order >> 32).astype(np.int32).view(np.float32)
        unique = np.where(np.isfinite(distance), order & 0xFFFFFFFF, -1)
        # int8 holds numbers between -1 and 1 in steps of at most 1/127
        rounding = 0 if self.bytes_a_number == 4 else np.abs(query).sum(1) / 127
        error = self.patches.kind.score_error(query.shape[1]) + rounding
        exhausted = (hit.sum(1) < requested) | (requested == len(self.patches.keys))
        return unique, distance, np.where(exhausted, np.inf, np.where(hit, near, 0).max(1) - error)

    def _exact(self, query: np.ndarray, unique: np.ndarray) -> np.ndarray:
        """Float32 squared distances [n, m] of queries and contexts; the same in every batch."""
        distance = np.empty(unique.shape, np.float32)
        step = max(1, EXACT_NUMBERS // max(1, query.shape[1] * unique.shape[1]))
        for first in range(0, len(unique), step):
            part = slice(first, first + step)
            distance[part] = host_distances(query[part], self.patches.keys[unique[part]])
        return distance


class HostSearch:
    """The searches of one or more shards as one callback."""

    def __init__(
        self,
        shards: dict[int, ShardSearch],
        bounds: list[tuple[int, int]],
        codebook: Float[np.ndarray, "V C"],
        k: int,
        index_hash: str = "",
    ):
        """
        Args:
          shards: shard → its search; a process needs only the shards of its own devices.
          bounds: first row and end of every shard.
          codebook: float32, rows of unit norm; makes the queries.
          k: neighbours a query.
          index_hash: of the saved index (``index.index_hash``); empty: built in memory.

        Raises:
          UserError: k is not in 1..N.
        """
        require_k(k, bounds[-1][1])
        self.shards, self.bounds, self.k, self.index_hash = shards, bounds, k, index_hash
        self.codebook = np.asarray(codebook, np.float32)

    def with_k(self, k: int) -> "HostSearch":
        """The same searchers for another number of neighbours; errors as the constructor."""
        return HostSearch(self.shards, self.bounds, self.codebook, k, self.index_hash)

    def search(
        self,
        context: Int[Array | np.ndarray, "*batch 4"],
        shard: Int[Array | np.ndarray | np.int32, "*one"],
        k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The callback: codes, distances and ids [*batch, K], K = ``k`` or its own; ids count from a shard's first."""
        search, k = self.shards[int(np.asarray(shard).reshape(-1)[0])], self.k if k is None else k
        flat, kind = np.asarray(context).reshape(-1, context.shape[-1]), search.patches.kind
        answer, whole = no_neighbors(len(flat), k), np.flatnonzero(kind.complete(flat))
        if len(whole):
            # contexts repeat (plain grounds), so each is requested once
            _, first, place = np.unique(packed(flat[whole]), return_index=True, return_inverse=True)
            requested = flat[whole[first]]
            found = search.search(requested, kind.query(self.codebook, requested), k)
            for slots, new in zip(answer, found, strict=True):
                slots[whole] = new[place]
        code, distance, id_ = (slots.reshape(*context.shape[:-1], k) for slots in answer)
        return code, distance, id_


def build_host(
    patches: Callable[[tuple[int, int]], Patches],
    num_rows: int,
    codebook: Float[np.ndarray, "V C"],
    k: int,
    options: ScannOptions = BY_RULE,
    shards: int = 1,
    local: Iterable[int] | None = None,
) -> HostSearch:
    """Builds indexes in memory, one a shard.

    Args:
      patches: from first row and end of a shard to its patches.
      num_rows: N.
      local: the shards that this process searches; None = all.

    Raises:
      UserError: k is not in 1..N, or ScaNN can't be imported.
    """
    require_k(k, num_rows)
    bounds, searches = shard_bounds(num_rows, shards), {}
    for shard in range(shards) if local is None else local:
        part = patches(bounds[shard])
        searches[shard] = ShardSearch(build_searcher(part, options), part, options)
    return HostSearch(searches, bounds, codebook, k)


@dataclasses.dataclass(frozen=True)
class _Ask:
    """The callback of every program that asks for K neighbours; equal ones are one part of one program."""

    k: int

    def __call__(self, context: Any, shard: Any, number: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        host = handles.look_up(number)
        if host is None:
            raise RuntimeError("a program asks a ScannRetriever that is gone: keep it until the results are there")
        return host.search(context, shard, self.k)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a program knows of a ``ScannRetriever``: K. Equal ones share a program, which must not keep the handle."""

    k: int
    handle: "weakref.ReferenceType[handles.Handle] | None" = dataclasses.field(compare=False)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class ScannRetriever:
    """Approximate ``interfaces.Retriever`` on the host; exact with ``EXHAUSTIVE``. Make one with ``create``.

    Where more than k stored patches share the k-th distance, those of lowest row are returned. One compiled program
    serves all retrievers of one k and batch; it finds the searchers by their number.

    Attributes:
      shard: which of the host's searchers to ask; int32 scalar, or [S] inside a ``ShardedRetriever``.
      number: the handle's; int32, of the same shape.
      k: neighbours a query.
      handle: of the ``HostSearch``, held by all retrievers made of this one; None inside a program.
    """

    shard: Any
    number: Any
    k: int
    handle: handles.Handle | None

    def tree_flatten(self) -> tuple[tuple[Any, Any], _Kind]:
        """For JAX: the arrays, and what is static."""
        return (self.shard, self.number), _Kind(self.k, None if self.handle is None else weakref.ref(self.handle))

    @classmethod
    def tree_unflatten(cls, kind: _Kind, leaves: Any) -> "ScannRetriever":
        """For JAX: the inverse. Equal kinds stand for one another, so the number decides which handle is meant."""
        handle = handles.holder(leaves[1]) or (kind.handle() if kind.handle is not None else None)
        return cls(leaves[0], leaves[1], kind.k, handle)

    @property
    def host(self) -> HostSearch:
        """The searchers, for k neighbours; not inside a program."""
        return cast(handles.Handle, self.handle).target.with_k(self.k)

    @classmethod
    def create(
        cls,
        keys: Float[np.ndarray, "N E"],
        codes: Int[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
        k: int,
        options: ScannOptions = BY_RULE,
    ) -> "ScannRetriever":
        """Builds an index in memory of keys as they are; arguments and errors as ``DenseRetriever.create``."""
        return cls.of(build_host(one_key_each(keys, codes), len(codes), codebook, k, options))

    @classmethod
    def of(cls, host: HostSearch) -> "ScannRetriever":
        """The retriever of a host search with one shard."""
        handle = handles.Handle(host)
        return cls(np.int32(0), np.int32(handle.number), host.k, handle)

    def with_k(self, k: int) -> "ScannRetriever":
        """The same search for another number of neighbours; errors as ``create``."""
        require_k(k, self.host.bounds[-1][1])
        return dataclasses.replace(self, k=k)

    def search(self, context: Int[Array, "B 4"]) -> Neighbors:
        """Neighbours of B contexts given as code ids; see ``interfaces.Retriever``."""
        require_own_process()
        shape = (len(context), self.k)
        result = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32))
        # a callback has no derivative, and none is wanted
        return Neighbors(*host_call(_Ask(self.k), result, *jax.lax.stop_gradient((context, self.shard, self.number))))
