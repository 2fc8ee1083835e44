"""A neighbour set: images as codes, with the codes of each cell's nearest stored patches, looked up ahead.

FAiD trains on it, so that no search stands in the training loop. One directory::

  manifest.json                              what the set is; written last, so a set is whole when it is there
  neighbors-00000-of-00006.arrayrecord       one image a record
  bad-00000-of-00006.txt                     only where there are any: what could not be read, a tab, and why

A record is little-endian uint16 [T] codes and [T, K] neighbours as code + 1 (0 = empty), then the caption in
UTF-8. A 12 x 12 grid with K = 16 has 4.9 KB and its caption, before compression.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int, Integer

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.retrieval.shards import ShardFolder, ShardSettings

MOST_CODES = 2**16 - 1  # code + 1 must fit uint16


@dataclasses.dataclass(frozen=True)
class NeighborSettings(ShardSettings):
    """What decides a set's content; ``manifest.json`` holds these fields and its files.

    Attributes, beside those of every folder of shards:
      k: neighbours a cell.
      keys, search, scann: how they were searched; see ``config.RetrievalConfig``.
      datastore: fingerprint of the store that was searched.
      store_images: how many of its images, the first ones.
      storage: what a dense search held of a key; "" of ScaNN, and of sets made before this was recorded.
      store, command: folder of the store and the command that began the build; records, never compared.
    """

    k: int
    keys: str
    search: str
    scann: ScannOptions
    datastore: str
    store_images: int
    storage: str = ""
    store: str = dataclasses.field(default="", compare=False)
    command: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_size > MOST_CODES:
            raise UserError(f"a codebook of {self.codebook_size} codes does not fit uint16; at most {MOST_CODES}")

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of a shard's one part, "neighbors"."""
        return {"neighbors": f"neighbors-{self.place(shard)}.arrayrecord"}


@dataclasses.dataclass(frozen=True)
class NeighborSet(ShardFolder):
    """A whole set, opened: a random-access source for Grain, read from any number of threads."""

    settings: NeighborSettings

    noun: ClassVar[str] = "neighbor set"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = NeighborSettings
    command: ClassVar[str] = "build_neighbors"
    rebuild: ClassVar[str] = (
        "build it with: python -m arrag_jax.build_neighbors --config=… --workdir=… (in manifest.json), "
        "once its folder is deleted"
    )

    @property
    def grid(self) -> tuple[int, int]:
        """[H, W]."""
        return self.settings.grid

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.settings.codebook_size

    @property
    def k(self) -> int:
        """Neighbours a cell."""
        return self.settings.k

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, i: int) -> dict[str, Any]:
        """An image: "codes" int32 [T], "neighbors" int32 [T, K] nearest first (-1 = empty), "caption"."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        codes, neighbors, caption = from_record(self._records[i], self.grid[0] * self.grid[1], self.k)
        return {"codes": codes, "neighbors": neighbors, "caption": caption}

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        """All shards as one; it opens a file on first use, under a lock."""
        shards = range(self.settings.num_shards)
        return ArrayRecordDataSource([str(self.directory / self.settings.shard_files(s)["neighbors"]) for s in shards])


def to_record(codes: Integer[np.ndarray, " T"], neighbors: Int[np.ndarray, "T K"], caption: bytes) -> bytes:
    """An image's record; codes from 0 and neighbours from -1, both below ``MOST_CODES``; a caption in UTF-8."""
    return codes.astype("<u2").tobytes() + (neighbors + 1).astype("<u2").tobytes() + caption


def from_record(record: bytes, cells: int, k: int) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, "T K"], str]:
    """Codes int32 [T], neighbours int32 [T, K] and the caption of a record of so many cells."""
    numbers = np.frombuffer(record, "<u2", cells * (1 + k)).astype(np.int32)
    return numbers[:cells], numbers[cells:].reshape(cells, k) - 1, record[2 * numbers.size :].decode()
