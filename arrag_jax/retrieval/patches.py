"""What a search goes over: the unique contexts of stored patches, each with the posting list of its patches.

Where equal contexts have equal keys (``KeyKind.unique``), patches are deduplicated: 11.8 million patches of
``emoji_scenes`` have 353 thousand unique contexts. Each is held once, with a posting list, the stored rows of its
patches; a search finds contexts and lays out their lists as patches again. Nothing is lost: ids are stored rows, as
without deduplication. Where keys hardly repeat, every patch stands for a context of its own, and there are no lists.

Every search orders patches by distance, then by stored row. Contexts are numbered in the order of their first patches,
so that of contexts at one distance the first k hold the k patches of lowest row.

Numpy alone: this runs inside host callbacks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt16, UInt64

from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.distances import rounded
from arrag_jax.ops.keys import KEY_KINDS, KeyKind
from arrag_jax.store.datastore import Datastore

MOST_ROWS = 2**31 - 1  # ids are int32


@runtime_checkable
class Keys(Protocol):
    """Keys that can be had by number: a numpy array, or what makes them from something smaller."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: Any, /) -> np.ndarray:
        """Float32 [..., E] of an integer array or slice of numbers."""
        ...


@dataclasses.dataclass(frozen=True)
class KeysOfContexts:
    """Keys that are the queries of unique contexts, 8 bytes each."""

    kind: KeyKind
    contexts: UInt16[np.ndarray, "U 4"]
    codebook: Float[np.ndarray, "V C"]

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def nbytes(self) -> int:
        """Bytes held, the codebook aside."""
        return self.contexts.nbytes

    @functools.cached_property
    def repeated(self) -> Bool[np.ndarray, " V"]:
        """Which codes' vectors are another code's as well, as ``ops.distances`` has them."""
        _, which, count = np.unique(rounded(self.codebook), axis=0, return_inverse=True, return_counts=True)
        return count[which.reshape(-1)] > 1

    def __getitem__(self, number: Any, /) -> np.ndarray:
        return self.kind.query(self.codebook, self.contexts[number])


@dataclasses.dataclass(frozen=True)
class KeysOfRows:
    """Keys of the stored rows ``[first, first + count)``, made of the images' records."""

    kind: KeyKind
    records: np.ndarray
    codebook: Float[np.ndarray, "V C"]
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """This part's share of the records."""
        patches = len(self.records) * len(grid_ops.positions_with_context(*self.records.shape[1:3]))
        return self.records.nbytes * self.count // patches

    def __getitem__(self, number: Any, /) -> np.ndarray:
        rows = np.arange(self.count)[number] if isinstance(number, slice) else np.asarray(number)
        return self.kind.stored(self.records, self.codebook, rows + self.first)


@dataclasses.dataclass(frozen=True)
class Patches:
    """N stored patches of U unique contexts; where keys hardly repeat, U = N and each patch has a key of its own.

    Attributes:
      keys: of every unique context.
      codes: the code each patch offers; context by context, and inside its posting list in stored-row order.
      kind: of the keys.
      contexts: code ids of every unique context, in the order of its first patch; None: each patch has its own key.
      starts: where in ``codes`` and ``rows`` the posting list of each context begins, and the end; None likewise.
      rows: the posting lists, one after another: stored row of each patch, in the order of ``codes``; None likewise,
        because it is its place.
      by_context: the unique contexts in ascending order of ``packed``; None likewise.
    """

    keys: Keys
    codes: Integer[np.ndarray, " N"]
    kind: KeyKind = KEY_KINDS["latent"]
    contexts: UInt16[np.ndarray, "U 4"] | None = None
    starts: Int[np.ndarray, " U+1"] | None = None
    rows: Int[np.ndarray, " N"] | None = None
    by_context: Int[np.ndarray, " U"] | None = None

    @classmethod
    def deduplicate(
        cls,
        contexts: Integer[np.ndarray, "N 4"],
        codes: Integer[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
        kind: KeyKind = KEY_KINDS["codebook"],
    ) -> "Patches":
        """Unique contexts and posting lists of patches, given in stored-row order, of at most 2**16 codes."""
        whole = packed(contexts)
        rows = np.argsort(whole, kind="stable").astype(np.int32)
        whole = whole[rows]
        starts = np.flatnonzero(np.concatenate([[True], whole[1:] != whole[:-1], [True]])).astype(np.int32)
        distinct, counts = whole[starts[:-1]], np.diff(starts)
        order = np.argsort(rows[starts[:-1]])  # of the first patches
        by_context = np.empty(len(order), np.int32)
        by_context[order] = np.arange(len(order))
        counts, moved = counts[order], starts[order]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        rows = rows[np.arange(len(rows)) + np.repeat(moved - starts[:-1], counts)]
        distinct, codebook = distinct[order].view("<u2").reshape(-1, 4), np.asarray(codebook, np.float32)
        keys, codes = KeysOfContexts(kind, distinct, codebook), codes.astype(np.uint16)[rows]
        return cls(keys, codes, kind, distinct, starts, rows, by_context)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.keys, self.codes, self.starts, self.rows, self.by_context)
        return sum(held.nbytes for held in arrays if held is not None)

    def own(self, context: Int[np.ndarray, "n 4"]) -> tuple[np.ndarray, np.ndarray]:
        """The number of exactly each context and that of its patches; (any, 0) where there is none.

        Also 0 where another context may be at distance 0, because two rows of the codebook are equal.
        """
        if self.contexts is None or self.starts is None or self.by_context is None:
            return np.zeros(len(context), np.int32), np.zeros(len(context), np.int32)
        assert isinstance(self.keys, KeysOfContexts)
        wanted, held = packed(context), self.contexts.view("<u8")[:, 0]
        place = np.searchsorted(held, wanted, sorter=self.by_context)
        unique = self.by_context[np.minimum(place, len(held) - 1)]
        alone = (held[unique] == wanted) & ~self.keys.repeated[context].any(1)
        return unique, np.where(alone, self.starts[unique + 1] - self.starts[unique], 0)

    def lay_out(
        self, unique: Int[np.ndarray, "n m"], distance: Float[np.ndarray, "n m"], k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first k patches of each row of unique contexts, by distance and then by stored row.

        Args:
          unique: nearest first, and at one distance in ascending order; -1 in empty slots, which come last.

        Returns:
          codes, distances and stored rows, [n, k].
        """
        unique, distance = unique[:, :k], distance[:, :k]
        found_code, found_distance, found_id = no_neighbors(len(unique), k)
        if self.starts is None:
            first, count = unique, (unique >= 0).astype(np.int64)
        else:
            first = self.starts[unique]
            count = np.where(unique >= 0, self.starts[unique + 1] - first, 0).astype(np.int64)
        equal = np.zeros(unique.shape, bool)  # to the one before
        equal[:, 1:] = (distance[:, 1:] == distance[:, :-1]) & (unique[:, 1:] >= 0)
        nearer = np.cumsum(count, 1) - count
        nearer = np.maximum.accumulate(np.where(equal, 0, nearer), 1)  # patches at smaller distances
        count = np.clip(k - nearer, 0, count)  # more than k in all where contexts at one distance compete
        slot = (np.cumsum(count, 1) - count).reshape(-1)
        count = count.reshape(-1)
        source = np.repeat(np.arange(unique.size), count)
        offset = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
        place = first.reshape(-1)[source] + offset
        query, slot, distance = source // unique.shape[1], slot[source] + offset, distance.reshape(-1)[source]
        if self.rows is not None:
            equal[:, :-1] |= equal[:, 1:]
            tied = np.flatnonzero(equal.reshape(-1)[source])
            order = np.lexsort((self.rows[place[tied]], distance[tied], query[tied]))
            place[tied] = place[tied[order]]  # queries and distances are in order already
        kept = slot < k
        where, place = (query[kept], slot[kept]), place[kept]
        found_code[where], found_distance[where] = self.codes[place], distance[kept]
        found_id[where] = place if self.rows is None else self.rows[place]
        return found_code, found_distance, found_id


def no_neighbors(queries: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of nothing, every slot empty, as numpy arrays that can be written to."""
    none = np.full((queries, k), -1, np.int32)
    return none, np.full((queries, k), np.inf, np.float32), none.copy()


def one_key_each(
    keys: Float[np.ndarray, "N E"], codes: Integer[np.ndarray, " N"]
) -> Callable[[tuple[int, int]], Patches]:
    """Patches of keys as they are, by first row and end."""
    return lambda rows: Patches(keys[slice(*rows)], codes[slice(*rows)])


def packed(contexts: Integer[np.ndarray, "n 4"]) -> UInt64[np.ndarray, " n"]:
    """Contexts as one number each: four code ids below 2**16."""
    return np.ascontiguousarray(contexts, "<u2").view("<u8")[:, 0]


def stored_patches(store: Datastore, name: str, rows: tuple[int, int]) -> Patches:
    """Patches of a part of a store; their rows count from its first.

    Args:
      name: of the kind of key, one of ``KEY_KINDS``.
      rows: first stored row and end.

    Raises:
      UserError: the store does not hold such keys, or more patches than ids can number.
    """
    store.require_kind(name)
    if store.num_patches > MOST_ROWS:
        most = MOST_ROWS // store.settings.patches_per_image
        raise UserError(
            f"datastore {store.directory} has {store.num_patches:,} patches, {MOST_ROWS:,} can be numbered; search its "
            f"first images alone: num_images={most}"
        )
    first, end = rows
    step = store.settings.patches_per_image
    images = first // step, -(-end // step)
    first, end = first - images[0] * step, end - images[0] * step
    grids = store.codes_of(*images)
    codes = grid_ops.next_codes_of_grids(grids).reshape(-1)[first:end]
    kind = KEY_KINDS[name]
    if kind.unique:
        contexts = grid_ops.contexts_of_grids(grids).reshape(-1, 4)[first:end]
        return Patches.deduplicate(contexts, codes, store.codebook, kind)
    records = store.records_of(kind.file, *images)
    return Patches(KeysOfRows(kind, records, store.codebook, first, end - first), codes, kind)
