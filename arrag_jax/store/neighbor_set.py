"""A neighbour set: images as codes, with the codes of each cell's nearest stored patches, looked up ahead.

FAiD trains on it, so that no search stands in the training loop. One directory::

  manifest.json                              what the set is; written last, so a set is whole when it is there
  neighbors-00000-of-00006.arrayrecord       one image a record
  bad-00000-of-00006.txt                     only where there are any: what could not be read, a tab, and why

A record is little-endian uint16 [T] codes and [T, K] neighbours as code + 1 (0 = empty), then the caption in
UTF-8. A 12 x 12 grid with K = 16 has 4.9 KB and its caption, before compression.
"""

import bisect
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int, Integer

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.parsing import in_range
from arrag_jax.store.shards import MOST_IMAGES, ShardFolder, ShardSettings, reading

MOST_CODES = 2**16 - 1  # code + 1 must fit uint16
MOST_NEIGHBORS = 2**20


@dataclasses.dataclass(frozen=True)
class NeighborSettings(ShardSettings):
    """What decides a set's content; ``manifest.json`` holds these fields and its files.

    Attributes, beside those of every folder of shards:
      k: neighbours a position.
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
        in_range("k", self.k, 1, MOST_NEIGHBORS)
        in_range("store_images", self.store_images, 0, MOST_IMAGES)

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of a shard's one kind of content, "neighbors"."""
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
        with reading(self._file_of(i), "", self.rebuild):
            codes, neighbors, caption = from_record(self._records[i], self.grid[0] * self.grid[1], self.k)
            if codes.max() >= self.codebook_size or neighbors.max() >= self.codebook_size:
                raise ValueError(f"image {i} has codes outside a codebook of {self.codebook_size}")
            if "\0" in caption:  # numbers that the settings do not know of
                raise ValueError(f"image {i} has more numbers than {self.grid} and k={self.k} tell")
        return {"codes": codes, "neighbors": neighbors, "caption": caption}

    def verify(self) -> None:
        """Checks every file's SHA-256, and that records have the shape that the settings tell."""
        super().verify()
        if len(self):
            self[0]

    def _file_of(self, i: int) -> Path:
        """The file that holds an image."""
        return self.directory / self._names[bisect.bisect_right(self._ends, i)]

    @functools.cached_property
    def _names(self) -> list[str]:
        """Names of the shards' files."""
        return [self.settings.shard_files(shard)["neighbors"] for shard in range(self.settings.num_shards)]

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The image behind the last one of each shard."""
        return list(itertools.accumulate(self.files[name]["images"] for name in self._names))

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        """All shards as one; it opens a file on first use, under a lock."""
        return ArrayRecordDataSource([str(self.directory / name) for name in self._names])


def to_record(codes: Integer[np.ndarray, " T"], neighbors: Int[np.ndarray, "T K"], caption: bytes) -> bytes:
    """An image's record; codes from 0 and neighbours from -1, both below ``MOST_CODES``; a caption in UTF-8."""
    return codes.astype("<u2").tobytes() + (neighbors + 1).astype("<u2").tobytes() + caption


def from_record(record: bytes, positions: int, k: int) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, "T K"], str]:
    """Codes int32 [T], neighbours int32 [T, K] and the caption of a record of so many cells."""
    numbers = np.frombuffer(record, "<u2", positions * (1 + k)).astype(np.int32)
    return numbers[:positions], numbers[positions:].reshape(positions, k) - 1, record[2 * numbers.size :].decode()
