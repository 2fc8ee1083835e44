"""The data that a search runs over: the unique contexts of stored patches, each with the posting list of its patches.

If equal contexts have equal keys (``KeyKind.unique``), patches are deduplicated: 11.8 million patches of
``emoji_scenes`` have 353 thousand unique contexts. Each unique context is held once, with a posting list: the stored
rows of its patches. A search finds contexts and expands their posting lists to patches. The result is the same as
without deduplication: ids are stored rows. For kinds of key that hardly repeat, every patch counts as its own context,
and there are no posting lists.

Every search orders patches by distance, then by stored row. Contexts are numbered in the order of their first patches.
The first k of several contexts at the same distance therefore hold the k patches with the lowest rows.

This module uses only numpy, because it runs inside host callbacks.
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
from arrag_jax.ops.keys import KEY_KINDS, HiddenKeys, KeyKind
from arrag_jax.store.datastore import Datastore

MOST_ROWS = 2**31 - 1  # ids are int32


@runtime_checkable
class Keys(Protocol):
    """A sequence of keys: a numpy array, or an object that computes keys from smaller data."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: Any, /) -> np.ndarray:
        """Returns the keys, float32 [..., E], for an integer array or a slice of numbers."""
        ...


@dataclasses.dataclass(frozen=True)
class KeysOfContexts:
    """Keys computed from unique contexts, each held in 8 bytes."""

    kind: KeyKind
    contexts: UInt16[np.ndarray, "U 4"]
    codebook: Float[np.ndarray, "V C"]

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def nbytes(self) -> int:
        """Bytes held, without the codebook."""
        return self.contexts.nbytes

    @functools.cached_property
    def repeated(self) -> Bool[np.ndarray, " V"]:
        """Which codes share their vector with another code, after the rounding of ``ops.distances``."""
        _, which, count = np.unique(rounded(self.codebook), axis=0, return_inverse=True, return_counts=True)
        return count[which.reshape(-1)] > 1

    def __getitem__(self, number: Any, /) -> np.ndarray:
        return self.kind.query(self.codebook, self.contexts[number])


@dataclasses.dataclass(frozen=True)
class KeysOfRows:
    """Keys of the stored rows ``[first, first + count)``, computed from the images' records."""

    kind: KeyKind
    records: np.ndarray
    table: Float[np.ndarray, "n_table C"]
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes of the records, in proportion to these rows."""
        patches = len(self.records) * self.kind.rows_in(self.records.shape[1:], self.table.shape)
        return self.records.nbytes * self.count // patches

    def __getitem__(self, number: Any, /) -> np.ndarray:
        rows = np.arange(self.count)[number] if isinstance(number, slice) else np.asarray(number)
        return self.kind.stored(self.records, self.table, rows + self.first)

    def held(self) -> np.ndarray:
        """Returns the stored bytes of all keys, for a kind with ``KeyKind.in_bytes``."""
        assert isinstance(self.kind, HiddenKeys)
        held = self.kind.held(self.records, self.table.shape[1])
        return held.reshape(-1, held.shape[2])[self.first : self.first + self.count]


def posting_lists(
    order: Int[np.ndarray, " N"], changes: Bool[np.ndarray, " N1"]
) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"], Int[np.ndarray, " U1"], Int[np.ndarray, " N"]]:
    """Returns the posting lists of U unique contexts, which are ordered by their first patches.

    Args:
      order: the patches, sorted by context and then by row.
      changes: whether a patch in that order has another context than the one before it; N − 1 of them.

    Returns:
      For each context its first place in ``order`` and its number among the sorted contexts; where its patches begin in
      the last array, with the end of all; and the patches.
    """
    begins = np.concatenate([[True], changes])[: len(order)]  # none if there are no patches
    bounds = np.append(np.flatnonzero(begins), len(order)).astype(np.int32)
    first, counts = bounds[:-1], np.diff(bounds)
    by_first = np.argsort(order[first])
    first, counts = first[by_first], counts[by_first]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return first, by_first, starts, order[np.arange(len(order)) + np.repeat(first - starts[:-1], counts)]


@dataclasses.dataclass(frozen=True)
class Patches:
    """N stored patches with U unique contexts; without deduplication, U = N and each patch has its own key.

    ``contexts``, ``starts``, ``rows`` and ``by_context`` are None without deduplication; a patch's index is then its
    row.

    Attributes:
      keys: the keys of the unique contexts.
      codes: the next code of each patch, grouped by context; within a posting list in order of stored row.
      kind: the kind of key.
      contexts: code ids of every unique context, in the order of their first patches.
      starts: where the posting list of each context begins in ``codes`` and ``rows``; the last item is N.
      rows: the concatenated posting lists: stored row of each patch, in the order of ``codes``.
      by_context: numbers of the unique contexts in ascending order of ``packed``.
      thinned: whether contexts may have no patch, see ``only``.
    """

    keys: Keys
    codes: Integer[np.ndarray, " N"]
    kind: KeyKind = KEY_KINDS["latent"]
    contexts: UInt16[np.ndarray, "U 4"] | None = None
    starts: Int[np.ndarray, " U+1"] | None = None
    rows: Int[np.ndarray, " N"] | None = None
    by_context: Int[np.ndarray, " U"] | None = None
    thinned: bool = False

    @classmethod
    def deduplicate(
        cls,
        contexts: Integer[np.ndarray, "N 4"],
        codes: Integer[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
        kind: KeyKind = KEY_KINDS["codebook"],
    ) -> "Patches":
        """Returns the unique contexts and posting lists of patches.

        Args:
          contexts, codes: context and next code of each patch, in order of stored row.
          codebook: at most 2**16 codes.
          kind: the kind of key.
        """
        whole = packed(contexts)
        order = np.argsort(whole, kind="stable").astype(np.int32)
        whole = whole[order]
        first, by_first, starts, rows = posting_lists(order, whole[1:] != whole[:-1])
        by_context = np.empty(len(first), np.int32)
        by_context[by_first] = np.arange(len(first))
        distinct = whole[first]
        distinct, codebook = distinct.view("<u2").reshape(-1, 4), np.asarray(codebook, np.float32)
        keys, codes = KeysOfContexts(kind, distinct, codebook), codes.astype(np.uint16)[rows]
        return cls(keys, codes, kind, distinct, starts, rows, by_context)

    @property
    def nbytes(self) -> int:
        """Bytes held by all arrays."""
        arrays = (self.keys, self.codes, self.starts, self.rows, self.by_context)
        return sum(held.nbytes for held in arrays if held is not None)

    def only(self, kept: Bool[np.ndarray, " N"]) -> "Patches":
        """Returns the patches of the stored rows ``kept``. Contexts and keys stay, so indexes over them stay valid.

        Without posting lists, the codes of other rows become -1, which no search finds.
        """
        if self.starts is None or self.rows is None:
            return dataclasses.replace(self, codes=np.where(kept, self.codes.astype(np.int32), -1), thinned=True)
        keep = kept[self.rows]
        starts = np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)[self.starts]
        return dataclasses.replace(self, starts=starts, codes=self.codes[keep], rows=self.rows[keep], thinned=True)

    def _with_patches(self, unique: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the contexts that have a patch and their distances, in the same order; then empty slots."""
        empty = self.codes[unique] < 0 if self.starts is None else self.starts[unique + 1] == self.starts[unique]
        empty |= unique < 0
        order = np.argsort(empty, axis=1, kind="stable")
        unique, distance = np.where(empty, -1, unique), np.where(empty, np.inf, distance)
        return np.take_along_axis(unique, order, 1), np.take_along_axis(distance, order, 1)

    def own(self, context: Int[np.ndarray, "n 4"] | Float[np.ndarray, "n E"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each query context, the equal unique context and the number of its patches.

        The number of patches is 0 if there is no equal context; the first result is then meaningless. It is also 0 if
        another context may be at distance 0, because two rows of the codebook are equal.
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
        """Expands each row of unique contexts to its first k patches, by distance and then by stored row.

        Args:
          unique: numbers of contexts, nearest first; equal distances in ascending order of number; -1 in empty slots,
            which come last.
          distance: their distances.
          k: patches per row.

        Returns:
          codes, distances and stored rows, [n, k].
        """
        if self.thinned:
            unique, distance = self._with_patches(unique, distance)
        unique, distance = unique[:, :k], distance[:, :k]
        found_code, found_distance, found_id = no_neighbors(len(unique), k)
        if self.starts is None:
            first, count = unique, (unique >= 0).astype(np.int64)
        else:
            first = self.starts[unique]
            count = np.where(unique >= 0, self.starts[unique + 1] - first, 0).astype(np.int64)
        equal = np.zeros(unique.shape, bool)  # whether the distance equals the previous one
        equal[:, 1:] = (distance[:, 1:] == distance[:, :-1]) & (unique[:, 1:] >= 0)
        nearer = np.cumsum(count, 1) - count
        nearer = np.maximum.accumulate(np.where(equal, 0, nearer), 1)  # number of patches at smaller distances
        count = np.clip(k - nearer, 0, count)  # the sum may exceed k if contexts share a distance
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
            place[tied] = place[tied[order]]  # queries and distances are already sorted
        kept = slot < k
        where, place = (query[kept], slot[kept]), place[kept]
        found_code[where], found_distance[where] = self.codes[place], distance[kept]
        found_id[where] = place if self.rows is None else self.rows[place]
        return found_code, found_distance, found_id


def no_neighbors(queries: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns neighbours with only empty slots, as writable numpy arrays."""
    none = np.full((queries, k), -1, np.int32)
    return none, np.full((queries, k), np.inf, np.float32), none.copy()


def one_key_each(
    keys: Float[np.ndarray, "N E"], codes: Integer[np.ndarray, " N"]
) -> Callable[[tuple[int, int]], Patches]:
    """Returns a function from (first row, end) to patches that have the given keys, without deduplication."""
    return lambda rows: Patches(keys[slice(*rows)], codes[slice(*rows)])


def packed(contexts: Integer[np.ndarray, "n 4"]) -> UInt64[np.ndarray, " n"]:
    """Packs each context, four code ids below 2**16, into one number."""
    return np.ascontiguousarray(contexts, "<u2").view("<u8")[:, 0]


def stored_patches(store: Datastore, name: str, rows: tuple[int, int]) -> Patches:
    """Returns the patches of a range of stored rows, without those of images that are not shown.

    Their own rows count from the first of the range.

    Args:
      store: the store to read.
      name: the kind of key, one of ``KEY_KINDS``.
      rows: first stored row and end.

    Raises:
      UserError: if the store does not hold such keys, or has more patches than int32 ids can number.
    """
    store.require_kind(name)
    kind, grid = KEY_KINDS[name], store.settings.grid
    step = len(kind.positions(grid))
    if store.num_rows(name) > MOST_ROWS:
        raise UserError(
            f"datastore {store.directory} has {store.num_rows(name):,} patches, {MOST_ROWS:,} can be numbered; search "
            f"its first images alone: num_images={MOST_ROWS // step}"
        )
    first, end = rows
    images = first // step, -(-end // step)
    first, end = first - images[0] * step, end - images[0] * step
    grids = store.codes_of(*images)
    codes = grids.reshape(len(grids), -1)[:, kind.positions(grid)].reshape(-1)[first:end]

    def shown(patches: Patches) -> Patches:
        return patches if store.shown is None else patches.only(np.repeat(store.shown[slice(*images)], step)[first:end])

    if kind.unique:
        contexts = grid_ops.contexts_of_grids(grids).reshape(-1, 4)[first:end]
        return shown(Patches.deduplicate(contexts, codes, store.codebook, kind))
    records = store.records_of(kind.file, *images)
    return shown(Patches(KeysOfRows(kind, records, store.table(name), first, end - first), codes, kind))
