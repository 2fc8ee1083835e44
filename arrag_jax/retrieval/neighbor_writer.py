"""Builds a neighbour set shard by shard (``building.build``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval import building
from arrag_jax.retrieval.encoding import Encode, Examples, encoded, require_images
from arrag_jax.retrieval.neighbor_set import NeighborSet, NeighborSettings, to_record

# One record a group, as random access wants it; 3 to 4 times smaller than uncompressed, for neighbours agree.
RECORD_OPTIONS = "group_size:1,zstd"
# int [B, H, W] codes, and whom to tell of images done → [B·M, K]; see ``others.OtherImages.search``
Search = Callable[[np.ndarray, Callable[[int], Any]], Neighbors]


def build(
    directory: str | Path,
    examples: Examples,
    encode: Encode,
    search: Search,
    settings: NeighborSettings,
    batch_size: int,
) -> NeighborSet:
    """Builds the set in ``directory``, or goes on with it, or finds it whole.

    A shard's images are searched for together, which is quicker the more they are. All depends on the shard
    alone, so that a resumed build gives the same bytes as long as ``search`` gives the same answers (a ScaNN
    tree made anew does not: it starts at random).

    Args:
      directory: made if absent.
      examples: with "caption" (UTF-8, as TFDS gives it) beside "image"; the first ``settings.num_images`` are taken.
      encode: called with batches of exactly ``batch_size``.
      search: of the store and by the means that ``settings`` tell.
      settings: what to build.
      batch_size: images a call of ``encode``.

    Raises:
      UserError: too few images, another set or build in the directory (nothing is touched), a code outside
        the codebook, or a disk that is full.
    """
    directory = Path(directory)
    require_images(examples, settings)

    def write_shard(shard: int, bar: tqdm) -> None:
        codes, captions = [], []
        for batch, batch_codes, _ in encoded(examples, settings.shard_images(shard), encode, batch_size, settings):
            codes.append(batch_codes)
            captions += [example["caption"] for example in batch]
        grids = np.concatenate(codes)
        found = neighbors_of_cells(search(grids, bar.update).code, settings.grid)
        records = map(to_record, grids.reshape(len(grids), -1), found, captions)
        building.write_records(directory / settings.shard_files(shard)["neighbors"], records, RECORD_OPTIONS)

    return building.build(NeighborSet, directory, settings, write_shard)


def neighbors_of_cells(code: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Codes [B·M, K] of the cells that have a context → int32 [B, T, K] of all cells, -1 in the others."""
    cells = grid_ops.cells_with_context(*grid)
    found = np.full((len(code) // len(cells), grid[0] * grid[1], code.shape[1]), -1, np.int32)
    found[:, cells] = code.reshape(-1, len(cells), code.shape[1])
    return found
