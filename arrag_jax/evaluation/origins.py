"""Origins of drawn codes: which stored images hold the patches that a picture's codes were found in.

A search returns one stored patch per code, and where many are equally near it returns the first that was stored. So a
patch's *copies*, all stored patches of the same context and the same code, are counted here, and each has an equal part
of the credit. A patch that more than one in ``COMMON`` of the images hold is *common ground*, such as a plain
background: it tells nothing about where a picture came from, and nobody has credit for it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval.patches import packed

COMMON = 20
BLOCK_IMAGES = 4096  # stored images looked through at once


class Origins(NamedTuple):
    """Where each cell's code was found; T cells in raster order, n stored images.

    Attributes:
      copies: stored patches equal to the one that was found; 0 where none was found.
      images: stored images that hold at least one of them.
      image: of these images the one with the most credit in the whole picture (of equal ones the first); -1 = none.
      position: the first cell of that image that holds it; -1 likewise.
      common: is the patch common ground?
      credit: every image's part of the picture, in cells: each cell's copies share one, common ground aside.
    """

    copies: Int[np.ndarray, " T"]
    images: Int[np.ndarray, " T"]
    image: Int[np.ndarray, " T"]
    position: Int[np.ndarray, " T"]
    common: Bool[np.ndarray, " T"]
    credit: Float[np.ndarray, " n"]


def origins(
    rows: Int[np.ndarray, " T"],
    stored: Integer[np.ndarray, "n H W"],
    searched: Int[np.ndarray, " M"] | None = None,
) -> Origins:
    """Returns the origins of a picture's cells.

    Args:
      rows: stored row of the neighbour that holds each cell's code; -1 = none does.
      stored: codes of all stored images.
      searched: numbers of the images that the search was limited to; None = all.
    """
    height, width = stored.shape[1:]
    found = rows >= 0
    image, position = grid_ops.image_and_position(rows[found], height, width)
    flat = stored.reshape(len(stored), -1)
    context = flat[image[:, None], grid_ops.context_positions(height, width)[position]]
    patch, which = np.unique(_whole(context, flat[image, position]), axis=0, return_inverse=True)
    which = which.reshape(-1)
    numbers = np.arange(len(stored)) if searched is None else np.unique(searched)
    held = _held(patch, stored, numbers)
    copies = np.bincount(held.patch, held.count, len(patch)).astype(np.int64)
    images = np.bincount(held.patch, minlength=len(patch))
    common = images > max(1, len(numbers) // COMMON)
    weight = np.where(common, 0.0, np.bincount(which, minlength=len(patch)) / np.maximum(copies, 1))
    credit = np.bincount(held.image, held.count * weight[held.patch], len(stored))
    order = np.lexsort((held.image, -credit[held.image], held.patch))
    best = order[np.searchsorted(held.patch[order], np.arange(len(patch)))] if len(order) else order
    spread = [np.full(rows.shape, empty) for empty in (0, 0, -1, -1, False)]
    for whole, known in zip(spread, (copies, images, held.image[best], held.position[best], common), strict=True):
        whole[found] = known[which]
    return Origins(*(*spread, credit))


@dataclasses.dataclass(frozen=True)
class _Held:
    """Patches that images hold, one row per pair: patch, image, how often, and the first cell."""

    patch: Int[np.ndarray, " m"]
    image: Int[np.ndarray, " m"]
    count: Int[np.ndarray, " m"]
    position: Int[np.ndarray, " m"]


def _whole(context: Integer[np.ndarray, "m 4"], code: Integer[np.ndarray, " m"]) -> Integer[np.ndarray, "m 2"]:
    """Patches as two numbers each: the context's four codes, of 16 bits, and the code."""
    return np.stack([packed(context), code.astype(np.uint64)], 1)


def _held(
    patch: Integer[np.ndarray, "m 2"], stored: Integer[np.ndarray, "n H W"], numbers: Int[np.ndarray, " M"]
) -> _Held:
    """Which of the images ``numbers`` hold which of the patches (in ascending order)."""
    contexts = np.unique(patch[:, 0])
    code_bits = np.uint64(16)
    keys = (np.searchsorted(contexts, patch[:, 0]).astype(np.uint64) << code_bits) | patch[:, 1]
    wanted = np.zeros(2**16, bool)
    wanted[patch[:, 1].astype(np.int64)] = True
    positions = grid_ops.positions_with_context(*stored.shape[1:])
    parts = [np.zeros((4, 0), np.int64)]
    for start in range(0, len(numbers) if len(patch) else 0, BLOCK_IMAGES):
        grids = stored[numbers[start : start + BLOCK_IMAGES]]
        codes = grid_ops.next_codes_of_grids(grids).reshape(-1)
        place = np.flatnonzero(wanted[codes])
        whole = _whole(grid_ops.contexts_of_grids(grids).reshape(-1, 4)[place], codes[place])
        at = np.minimum(np.searchsorted(contexts, whole[:, 0]), len(contexts) - 1)
        known = contexts[at] == whole[:, 0]
        place, key = place[known], (at[known].astype(np.uint64) << code_bits) | whole[known, 1]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        place, at = place[keys[at] == key], at[keys[at] == key]
        image, position = numbers[start + place // len(positions)], positions[place % len(positions)]
        pair, first, count = np.unique(at * len(stored) + image, return_index=True, return_counts=True)
        parts.append(np.stack([pair // len(stored), pair % len(stored), count, position[first]]))
    return _Held(*np.concatenate(parts, 1))
