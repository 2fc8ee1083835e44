"""What a search goes over: stored patches, those of equal context folded into one entry.

Keys of kind "codebook" follow from four code ids, and equal contexts have equal keys: 11.8 million patches of
``emoji_scenes`` have 353 thousand different contexts. So each is an *entry*, held once, with the list of its patches; a
search finds entries and lays them out as patches again. Nothing is lost: ids are stored rows, as without
folding. Keys of kind "latent" hardly repeat; there every patch is its own entry.

Every search orders patches by distance, then by stored row. Entries are numbered in the order of their first patches,
so that of entries at one distance the first k hold the k patches of lowest row.

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
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.store.datastore import Datastore, unit_norm

MOST_ROWS = 2**31 - 1  # ids are int32


@runtime_checkable
class Keys(Protocol):
    """Keys that can be had by entry: a numpy array, or what makes them from something smaller."""

    nbytes: int

    def __len__(self) -> int: ...

    def __getitem__(self, entry: Any, /) -> np.ndarray:
        """Float32 [..., E] of an integer array or slice of entries."""
        ...


@dataclasses.dataclass(frozen=True)
class CodebookKeys:
    """Keys of contexts, 8 bytes each; their codes' vectors side by side."""

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

    def __getitem__(self, entry: Any, /) -> np.ndarray:
        vectors = np.take(self.codebook, self.contexts[entry], 0)
        return vectors.reshape(*vectors.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class LatentKeys:
    """Keys of the stored rows ``[first, first + count)``, from the maps of cell vectors that they share."""

    maps: Float[np.ndarray, "n H W C"]
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """This part's share of the maps."""
        _, height, width, _ = self.maps.shape
        return self.maps.nbytes * self.count // (len(self.maps) * len(grid_ops.cells_with_context(height, width)))

    def __getitem__(self, entry: Any, /) -> np.ndarray:
        rows = np.arange(self.count)[entry] if isinstance(entry, slice) else np.asarray(entry)
        _, height, width, dim = self.maps.shape
        image, cell = grid_ops.image_and_cell(rows + self.first, height, width)
        cells = image[..., None] * (height * width) + grid_ops.context_cells(height, width)[cell]
        return unit_norm(self.maps.reshape(-1, dim)[cells]).reshape(*rows.shape, -1)


@dataclasses.dataclass(frozen=True)
class Patches:
    """N stored patches as U entries.

    Attributes:
      keys: of every entry; ``CodebookKeys`` where folded.
      codes: the code each patch offers; entry by entry, and inside an entry in stored-row order.
      contexts: code ids of every entry, in the order of its first patch; None: entries are patches, unfolded.
      starts: where in ``codes`` and ``rows`` each entry begins, and the end; None when unfolded.
      rows: stored row of each patch, in the order of ``codes``; None when unfolded: it is its place.
      by_context: the entries in ascending order of ``packed`` contexts; None when unfolded.
    """

    keys: Keys
    codes: Integer[np.ndarray, " N"]
    contexts: UInt16[np.ndarray, "U 4"] | None = None
    starts: Int[np.ndarray, " U+1"] | None = None
    rows: Int[np.ndarray, " N"] | None = None
    by_context: Int[np.ndarray, " U"] | None = None

    @classmethod
    def fold(
        cls,
        contexts: Integer[np.ndarray, "N 4"],
        codes: Integer[np.ndarray, " N"],
        codebook: Float[np.ndarray, "V C"],
    ) -> "Patches":
        """Folds patches, given in stored-row order, of at most 2**16 codes."""
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
        keys, codes = CodebookKeys(distinct, codebook), codes.astype(np.uint16)[rows]
        return cls(keys, codes, distinct, starts, rows, by_context)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.keys, self.codes, self.starts, self.rows, self.by_context)
        return sum(held.nbytes for held in arrays if held is not None)

    def own(self, context: Int[np.ndarray, "n 4"]) -> tuple[np.ndarray, np.ndarray]:
        """The entry of exactly each context and the number of its patches; (any, 0) where there is none.

        Also 0 where another context may be at distance 0, because two rows of the codebook are equal.
        """
        if self.contexts is None:
            return np.zeros(len(context), np.int32), np.zeros(len(context), np.int32)
        wanted, held = packed(context), self.contexts.view("<u8")[:, 0]
        place = np.searchsorted(held, wanted, sorter=self.by_context)
        entry = self.by_context[np.minimum(place, len(held) - 1)]
        alone = (held[entry] == wanted) & ~self.keys.repeated[context].any(1)
        return entry, np.where(alone, self.starts[entry + 1] - self.starts[entry], 0)

    def lay_out(
        self, entry: Int[np.ndarray, "n m"], distance: Float[np.ndarray, "n m"], k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first k patches of each row of entries, by distance and then by stored row.

        Args:
          entry: nearest first, and at one distance in ascending order; -1 in empty slots, which come last.

        Returns:
          codes, distances and stored rows, [n, k].
        """
        entry, distance = entry[:, :k], distance[:, :k]
        found = no_neighbors(len(entry), k)
        if self.starts is None:
            first, count = entry, (entry >= 0).astype(np.int64)
        else:
            first = self.starts[entry]
            count = np.where(entry >= 0, self.starts[entry + 1] - first, 0).astype(np.int64)
        equal = np.zeros(entry.shape, bool)  # to the entry before
        equal[:, 1:] = (distance[:, 1:] == distance[:, :-1]) & (entry[:, 1:] >= 0)
        nearer = np.cumsum(count, 1) - count
        nearer = np.maximum.accumulate(np.where(equal, 0, nearer), 1)  # patches at smaller distances
        count = np.clip(k - nearer, 0, count)  # more than k in all where entries at one distance compete
        slot = (np.cumsum(count, 1) - count).reshape(-1)
        count = count.reshape(-1)
        source = np.repeat(np.arange(entry.size), count)
        offset = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
        place = first.reshape(-1)[source] + offset
        query, slot, away = source // entry.shape[1], slot[source] + offset, distance.reshape(-1)[source]
        if self.rows is not None:
            equal[:, :-1] |= equal[:, 1:]
            tied = np.flatnonzero(equal.reshape(-1)[source])
            order = np.lexsort((self.rows[place[tied]], away[tied], query[tied]))
            place[tied] = place[tied[order]]  # queries and distances are in order already
        kept = slot < k
        where, place = (query[kept], slot[kept]), place[kept]
        found.code[where], found.distance[where] = self.codes[place], away[kept]
        found.id[where] = place if self.rows is None else self.rows[place]
        return tuple(found)


def no_neighbors(queries: int, k: int) -> Neighbors:
    """Neighbours of nothing, every slot empty, as numpy arrays that can be written to."""
    none = np.full((queries, k), -1, np.int32)
    return Neighbors(none, np.full((queries, k), np.inf, np.float32), none.copy())


def unfolded(keys: Float[np.ndarray, "N E"], codes: Integer[np.ndarray, " N"]) -> Callable[[tuple[int, int]], Patches]:
    """Patches of keys as they are, by first row and end."""
    return lambda rows: Patches(keys[slice(*rows)], codes[slice(*rows)])


def packed(contexts: Integer[np.ndarray, "n 4"]) -> UInt64[np.ndarray, " n"]:
    """Contexts as one number each: four code ids below 2**16."""
    return np.ascontiguousarray(contexts, "<u2").view("<u8")[:, 0]


def stored_patches(store: Datastore, kind: str, rows: tuple[int, int]) -> Patches:
    """Patches of a part of a store; their rows count from its first.

    Args:
      kind: "codebook" or "latent".
      rows: first stored row and end.

    Raises:
      UserError: the store does not hold such keys, or more patches than ids can number.
    """
    store.require_kind(kind)
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
    if kind == "latent":
        return Patches(LatentKeys(store.latents_of(*images), first, end - first), codes)
    return Patches.fold(grid_ops.contexts_of_grids(grids).reshape(-1, 4)[first:end], codes, store.codebook)
