"""Builds a neighbour set shard by shard (``building.build``)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.data.examples import BadImage, Example, Examples, caption_of
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.progress import Bar
from arrag_jax.store import building
from arrag_jax.store.encoding import Encode, encoded, require_images
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings, to_record
from arrag_jax.store.skipped import SkippedImages

NO_CAPTION = "it has no caption"
# One record a group, as random access wants it; 3 to 4 times smaller than uncompressed, for neighbours agree.
RECORD_OPTIONS = "group_size:1,zstd"
# int [B, H, W] codes, where the images came from, whom to tell of images done → [B·M, K]; ``others.LeaveOneOut.search``
Search = Callable[[np.ndarray, Sequence[str], Callable[[int], Any]], Neighbors]


def build(
    directory: str | Path,
    examples: Examples,
    encode: Encode,
    search: Search,
    settings: NeighborSettings,
    batch_size: int,
    source_id: Callable[[int], str],
    max_bad_fraction: float = 0.0,
    min_bad: int = 0,
) -> NeighborSet:
    """Builds the set in ``directory``, or goes on with it, or finds it whole.

    A shard's images are searched for together, which is quicker the more they are. All depends on the shard
    alone, so that a resumed build gives the same bytes as long as ``search`` gives the same answers (a ScaNN
    tree made anew does not: it starts at random). An image without a caption is a bad one: FAiD learns from both.

    Args:
      directory: made if absent.
      examples: with "caption" beside "image"; the first ``settings.num_images`` (any, if the set is whole) are taken.
      encode: called with batches of exactly ``batch_size``.
      search: of the store and by the means that ``settings`` tell.
      settings: what to build.
      batch_size: images a call of ``encode``.
      source_id: image number → one line that tells where it came from.
      max_bad_fraction: share of bad images above which the build fails.
      min_bad: as ``SkippedImages.least``.

    Raises:
      UserError: too few images or too many bad ones, another set or build in the directory (nothing is touched), a
        code outside the codebook, or a disk that is full.
    """
    directory = Path(directory)
    if building.require_same_settings(NeighborSet, directory, settings) != "whole":
        require_images(examples, settings)
    left_out = SkippedImages(directory, settings, source_id, max_bad_fraction, min_bad)

    def write_shard(shard: int, bar: Bar) -> None:
        bad, skip = left_out.of_shard(shard, bar)
        numbers, codes, captions = settings.shard_images(shard), [], []
        for batch, batch_codes, _ in encoded(_Captioned(examples), numbers, encode, batch_size, settings, skip):
            codes.append(batch_codes)
            captions += [example["caption"].encode() for example in batch]
        names, records = left_out.write(shard, bad), []
        if names:
            grids = np.concatenate(codes)
            found = neighbors_of_cells(search(grids, names, bar.update).code, settings.grid)
            records = map(to_record, grids.reshape(len(grids), -1), found, captions)
        building.write_records(directory / settings.shard_files(shard)["neighbors"], records, RECORD_OPTIONS)
        left_out.require_few()

    return building.build(NeighborSet, directory, settings, write_shard, finish=left_out.require_few)


class _Captioned:
    """Examples with their captions as they are kept; those without one are bad."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        caption = caption_of(example)
        if not caption:
            raise BadImage(NO_CAPTION)
        return {**example, "caption": caption}


def neighbors_of_cells(code: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Codes [B·M, K] of the cells that have a context → int32 [B, T, K] of all cells, -1 in the others."""
    cells = grid_ops.cells_with_context(*grid)
    found = np.full((len(code) // len(cells), grid[0] * grid[1], code.shape[1]), -1, np.int32)
    found[:, cells] = code.reshape(-1, len(cells), code.shape[1])
    return found
