"""Origins of sampled codes: the stored images that hold the patches in which a generated image's codes were found.

A search returns one stored patch per code; among equally near patches, it returns the first that was stored.
Therefore this module counts a patch's *copies*, which are all stored patches with the same context and the same code.
Each copy gets an equal part of the credit. A patch that more than one in ``COMMON`` images hold is *common ground*,
such as a plain background. It says nothing about the origin of an image, and no image gets credit for it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval.patches import packed

COMMON = 20
BLOCK_IMAGES = 4096  # stored images that are processed at once


class Origins(NamedTuple):
    """The origin of the code at each position; T positions in raster order, n stored images.

    Attributes:
      copies: number of stored patches equal to the retrieved one; 0 if none was retrieved.
      images: number of stored images that hold at least one of them.
      image: among these images, the one with the most credit in the whole generated image (ties: the first); -1 = none.
      position: the first position of that image that holds the patch; -1 = none.
      common: whether the patch is common ground.
      credit: each image's part of the generated image, in positions. The copies of each position share one unit; common
        ground is excluded.
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
    """Returns the origins of an image's positions.

    Args:
      rows: stored row of the neighbour that holds each position's code; -1 = none.
      stored: codes of all stored images.
      searched: numbers of the images to which the search was limited; None = all.
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
    """Patches that images hold, one row per pair: patch, image, number of copies, and first position."""

    patch: Int[np.ndarray, " m"]
    image: Int[np.ndarray, " m"]
    count: Int[np.ndarray, " m"]
    position: Int[np.ndarray, " m"]


def _whole(context: Integer[np.ndarray, "m 4"], code: Integer[np.ndarray, " m"]) -> Integer[np.ndarray, "m 2"]:
    """Returns patches as two integers each: the context's four codes of 16 bits, and the code."""
    return np.stack([packed(context), code.astype(np.uint64)], 1)


def _held(
    patch: Integer[np.ndarray, "m 2"], stored: Integer[np.ndarray, "n H W"], numbers: Int[np.ndarray, " M"]
) -> _Held:
    """Returns which of the images ``numbers`` hold which of the patches (in ascending order)."""
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
