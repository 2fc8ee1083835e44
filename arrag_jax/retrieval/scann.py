"""Approximate search on the host: ScaNN behind ``ops.host.host_call``.

Only this module handles the peculiarities of ScaNN: it returns ids as uint32, pads misses with id 0 and distance NaN,
may return fewer columns than requested, and returns equal distances in any order.

An index is a k-means tree over unique contexts (``retrieval.patches``); a search scores the members of the leaves
nearest to a query, in squared L2. Keys have only 32 numbers; asymmetric hashing then has lower recall in the same time
and longer builds. Trees for the dot product have lower recall on keys of equal norm. If contexts hardly repeat, keys
are held as int8. The distances of ScaNN's results are recomputed in float32, and a bound on ScaNN's errors decides
whether more results are requested. Distances are therefore exact and equal in every batch with float32 and int8; only
neighbours in leaves that are not searched are missed. A context with k patches of its own needs no search. The
callback uses only numpy and ScaNN, because jax.numpy inside a host callback hangs on CPU.
"""

import dataclasses
import itertools
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
from arrag_jax.retrieval.patches import KeysOfRows, Patches, no_neighbors, one_key_each, packed
from arrag_jax.retrieval.scann_rules import BY_RULE, bytes_a_number, num_leaves, num_leaves_to_search

TRAINING_KEYS = 200_000  # largest number of keys for k-means
QUERIES_A_THREAD = 2  # smallest batch per thread, because handing over a single query costs more than it saves
SPARE = {4: (16, 0.0), 1: (64, 0.5)}  # bytes per number → extra contexts requested (number, share)
MORE = 4  # factor by which more contexts are requested if there were too few
BLOCK = 2**16  # keys computed at once
EXACT_NUMBERS = 2**18  # numbers per block of distances, so that a block fits a core's cache


def import_scann() -> ModuleType:
    """Returns ScaNN's numpy interface.

    Raises:
      UserError: if ScaNN cannot be imported (its wheels exist only for Linux).
    """
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(f"ScaNN cannot be imported here ({error}); use the dense search: search='dense'") from error
    return scann_ops_pybind


@hushed()
def build_searcher(patches: Patches, options: ScannOptions) -> Any:
    """Returns a ScaNN searcher over the unique contexts; on one type of machine, every build has the same bytes."""
    unique = len(patches.keys)
    keys = np.empty((unique, patches.keys[:1].shape[1]), np.float32)
    for first in range(0, unique, BLOCK):
        keys[first : first + BLOCK] = patches.keys[first : first + BLOCK]
    leaves = num_leaves(unique, options)
    builder = import_scann().builder(keys, 10, "squared_l2")  # 10 is only a default, which every search overrides
    if leaves:
        # Deterministic: ScaNN's random start has no seed but its k-means++ has; several threads assign keys at random.
        means = {"training_sample_size": min(unique, TRAINING_KEYS), "quantize_centroids": True, "random_init": False}
        builder = builder.tree(leaves, num_leaves_to_search(unique, 10, options), **means).set_n_training_threads(1)
    return builder.score_brute_force(quantize=bytes_a_number(unique, len(patches.codes), options) == 1).build()


def shard_bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """Returns (first row, end) of each shard; shards are contiguous and in order, and sizes differ by at most one.

    Raises:
      UserError: if there are fewer rows than shards.
    """
    if rows < shards:
        raise UserError(f"{rows} stored patches cannot be spread over {shards} shards; choose {rows} or fewer")
    return list(itertools.pairwise(rows * shard // shards for shard in range(shards + 1)))


class ShardSearch:
    """The searcher of one shard, with its patches."""

    def __init__(self, searcher: Any, patches: Patches, options: ScannOptions):
        """
        Args:
          searcher: the result of ``build_searcher(patches, options)``.
          options: the options of the build; only ``leaves_to_search`` may differ.
        """
        self.searcher, self.patches, self.options = searcher, patches, options
        self.bytes_a_number = bytes_a_number(len(patches.keys), len(patches.codes), options)
        self.steps = np.zeros(patches.keys[:1].shape[1]) if self.bytes_a_number == 4 else _steps(patches)

    @property
    def nbytes(self) -> int:
        """Bytes held: keys with norms and leaves in both directions, centroids, contexts, rows and codes."""
        unique, numbers = len(self.patches.keys), self.patches.keys[:1].shape[1]
        leaves = num_leaves(unique, self.options)
        each = numbers * self.bytes_a_number + (4 if self.bytes_a_number == 1 else 0) + (8 if leaves else 0)
        return unique * each + 4 * leaves * numbers + self.patches.nbytes

    def search(
        self, context: np.ndarray, query: Float[np.ndarray, "n E"], k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns codes, squared distances and stored rows [n, k] for contexts and their query vectors.

        They are ordered by distance, then by stored row.
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
        """Returns contexts and distances [n, requested], and [n] lower bounds for other contexts of the same leaves."""
        found, near = self.searcher.search_batched_parallel(
            query,
            final_num_neighbors=requested,
            leaves_to_search=num_leaves_to_search(len(self.patches.keys), requested, self.options),
            batch_size=QUERIES_A_THREAD,
        )
        hit = ~np.isnan(near)
        unique = np.where(hit, found, 0).astype(np.int64)
        distance = np.where(hit, self._exact(query, unique), np.inf).astype(np.float32)
        # The bits of floats that are not negative sort like the floats, so one sort orders by distance and context.
        order = np.sort(distance.view(np.int32).astype(np.int64) << 32 | unique, 1)
        distance = (order >> 32).astype(np.int32).view(np.float32)
        unique = np.where(np.isfinite(distance), order & 0xFFFFFFFF, -1)
        # int8 holds numbers between -1 and 1 in steps of at most 1/127
        rounding = np.abs(query) @ self.steps
        farthest = np.where(hit, near, 0).max(1)
        error = self.patches.kind.score_error(query, farthest) + rounding
        exhausted = (hit.sum(1) < requested) | (requested == len(self.patches.keys))
        return unique, distance, np.where(exhausted, np.inf, farthest - error)

    def _exact(self, query: np.ndarray, unique: np.ndarray) -> np.ndarray:
        """Returns float32 squared distances [n, m] of queries and contexts; they are equal in every batch."""
        distance = np.empty(unique.shape, np.float32)
        step = max(1, EXACT_NUMBERS // max(1, query.shape[1] * unique.shape[1]))
        for first in range(0, len(unique), step):
            part = slice(first, first + step)
            distance[part] = host_distances(query[part], self.patches.keys[unique[part]])
        return distance


def _steps(patches: Patches) -> Float[np.ndarray, " E"]:
    """Returns the largest step between the numbers that ScaNN's int8 holds, for each number of a key.

    ScaNN holds numbers up to the largest one, m, in steps of m / 127. If stored bytes use the whole range of int8, its
    numbers are these bytes, and nothing is rounded.
    """
    if not (patches.kind.in_bytes and isinstance(patches.keys, KeysOfRows)):
        return np.full(patches.keys[:1].shape[1], 1 / 127)
    held = patches.keys.held()
    lossless = np.maximum(held.max(0), -held.min(0)) == 127
    return np.where(lossless, 0, patches.keys.table[-1] / 127)


class HostSearch:
    """The host callback that searches one or more shards."""

    def __init__(
        self,
        shards: dict[int, ShardSearch],
        bounds: list[tuple[int, int]],
        table: Float[np.ndarray, "n_table C"],
        k: int,
        index_hash: str = "",
    ):
        """
        Args:
          shards: shard → its search; a process needs only the shards of its own devices.
          bounds: (first row, end) of every shard.
          table: the table of the kind of key (``ops.keys.kind``); for keys of the context the codebook.
          k: neighbours per query.
          index_hash: hash of the saved index (``index.index_hash``); "" = the index was built in memory.

        Raises:
          UserError: if k is not in 1..N.
        """
        require_k(k, bounds[-1][1])
        self.shards, self.bounds, self.k, self.index_hash = shards, bounds, k, index_hash
        self.table = np.asarray(table, np.float32)

    def with_k(self, k: int) -> "HostSearch":
        """Returns the same search for another number of neighbours; errors as in the constructor."""
        return HostSearch(self.shards, self.bounds, self.table, k, self.index_hash)

    def search(
        self,
        context: Int[Array | np.ndarray, "*batch 4"] | Float[Array | np.ndarray, "*batch E"],
        shard: Int[Array | np.ndarray | np.int32, "*one"],
        k: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns codes, distances and ids [*batch, K]; ids count from the shard's first row; K = ``k`` or self.k."""
        search, k = self.shards[int(np.asarray(shard).reshape(-1)[0])], self.k if k is None else k
        flat, kind = np.asarray(context).reshape(-1, context.shape[-1]), search.patches.kind
        answer, whole = no_neighbors(len(flat), k), np.flatnonzero(kind.complete(flat))
        if len(whole):
            # each context is searched once, because contexts repeat (in uniform backgrounds)
            _, first, place = np.unique(_identities(flat[whole]), return_index=True, return_inverse=True)
            requested = flat[whole[first]]
            found = search.search(requested, kind.query(self.table, requested), k)
            for slots, new in zip(answer, found, strict=True):
                slots[whole] = new[place]
        code, distance, id_ = (slots.reshape(*context.shape[:-1], k) for slots in answer)
        return code, distance, id_


def _identities(requested: np.ndarray) -> np.ndarray:
    """Returns one number per request; equal requests have equal numbers."""
    return packed(requested) if requested.dtype.kind in "iu" else np.arange(len(requested))


def build_host(
    patches: Callable[[tuple[int, int]], Patches],
    num_rows: int,
    table: Float[np.ndarray, "n_table C"],
    k: int,
    options: ScannOptions = BY_RULE,
    shards: int = 1,
    local: Iterable[int] | None = None,
) -> HostSearch:
    """Returns a search over indexes built in memory, one per shard.

    Args:
      patches: (first row, end) of a shard → its patches.
      num_rows: N.
      local: the shards that this process searches; None = all.

    Raises:
      UserError: if k is not in 1..N, or ScaNN cannot be imported.
    """
    require_k(k, num_rows)
    bounds, searches = shard_bounds(num_rows, shards), {}
    for shard in range(shards) if local is None else local:
        part = patches(bounds[shard])
        searches[shard] = ShardSearch(build_searcher(part, options), part, options)
    return HostSearch(searches, bounds, table, k)


@dataclasses.dataclass(frozen=True)
class _Ask:
    """The callback of every program that requests K neighbours; equal callbacks share one compiled program."""

    k: int

    def __call__(self, context: Any, shard: Any, number: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        host = handles.look_up(number)
        if host is None:
            raise RuntimeError("a program searches a ScannRetriever that was freed; keep it until it has ended")
        return host.search(context, shard, self.k)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The static part of a ``ScannRetriever``: K alone, so that programs are shared and keep no handle alive."""

    k: int
    handle: "weakref.ReferenceType[handles.Handle] | None" = dataclasses.field(compare=False)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class ScannRetriever:
    """Approximate ``interfaces.Retriever`` on the host; exact with ``EXHAUSTIVE``. Make one with ``create``.

    If more than k stored patches share the k-th distance, those with the lowest rows are returned. One compiled program
    serves all retrievers of the same k and batch size; it finds the searchers by the handle's number.

    Attributes:
      shard: the shard to search; int32 scalar, or [S] inside a ``ShardedRetriever``.
      number: the number of the handle; int32, of the same shape.
      k: neighbours per query.
      handle: keeps the ``HostSearch`` alive; shared by all copies of this retriever, None inside a program.
    """

    shard: Any
    number: Any
    k: int
    handle: handles.Handle | None

    def tree_flatten(self) -> tuple[tuple[Any, Any], _Kind]:
        """Returns the arrays and the static part, for JAX."""
        return (self.shard, self.number), _Kind(self.k, None if self.handle is None else weakref.ref(self.handle))

    @classmethod
    def tree_unflatten(cls, kind: _Kind, leaves: Any) -> "ScannRetriever":
        """Inverts ``tree_flatten``; the number selects the handle, because JAX may pass another, equal kind."""
        handle = handles.holder(leaves[1]) or (kind.handle() if kind.handle is not None else None)
        return cls(leaves[0], leaves[1], kind.k, handle)

    @property
    def host(self) -> HostSearch:
        """The host search, for k neighbours; not available inside a program."""
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
        """Builds an index of the given keys in memory; arguments and errors as in ``DenseRetriever.create``."""
        return cls.of(build_host(one_key_each(keys, codes), len(codes), codebook, k, options))

    @classmethod
    def of(cls, host: HostSearch) -> "ScannRetriever":
        """Returns the retriever of a host search with one shard."""
        handle = handles.Handle(host)
        return cls(np.int32(0), np.int32(handle.number), host.k, handle)

    def with_k(self, k: int) -> "ScannRetriever":
        """Returns the same search for another number of neighbours; errors as in ``create``."""
        require_k(k, self.host.bounds[-1][1])
        return dataclasses.replace(self, k=k)

    def search(self, context: Int[Array, "B 4"] | Float[Array, "B E"]) -> Neighbors:
        """Returns the neighbours of B contexts given as code ids, or of B projected states."""
        require_own_process()
        shape = (len(context), self.k)
        result = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32))
        # a callback has no derivative, so the gradient stops here
        return Neighbors(*host_call(_Ask(self.k), result, *jax.lax.stop_gradient((context, self.shard, self.number))))
