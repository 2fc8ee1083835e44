"""A neighbour set: the codes of images, and for each position the precomputed codes of its nearest stored patches.

FAiD trains on it, so that the training loop needs no search. One directory::

  manifest.json                              what the set is; written last, so a set that has it is complete
  neighbors-00000-of-00006.arrayrecord       one record per image
  bad-00000-of-00006.txt                     only if images were left out: one line per image, id, a tab, the reason

A record is little-endian uint16: codes [T], then neighbours [T, K] as code + 1 (0 = empty), then the caption in UTF-8.
With a 12 x 12 grid and K = 16, a record has 4.9 KB plus its caption before compression.
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

from arrag_jax import huggingface, object_storage
from arrag_jax.config import BY_HABIT, ColumnsConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.parsing import in_range
from arrag_jax.store.shards import MOST_IMAGES, ShardFolder, ShardSettings, reading

MOST_CODES = 2**16 - 1  # code + 1 must fit uint16
MOST_NEIGHBORS = 2**20


@dataclasses.dataclass(frozen=True)
class NeighborSettings(ShardSettings):
    """The settings that determine a set's content; ``manifest.json`` holds them.

    Attributes (besides those of ``ShardSettings``):
      k: neighbours per position.
      keys, search, scann: how the neighbours were searched; see ``config.RetrievalConfig``.
      datastore: fingerprint of the store that was searched.
      store_images: number of images searched, the first ones of the store.
      storage: the number format in which a dense search held keys; "" for ScaNN and for sets older than this field.
      columns: the columns of Parquet files that were read.
      backbone: fingerprint of the backbone whose states were searched; "" for keys of the context.
      store, command: the store's folder, and the command that started the build. Records, never compared.
    """

    k: int
    keys: str
    search: str
    scann: ScannOptions
    datastore: str
    store_images: int
    storage: str = ""
    columns: ColumnsConfig = BY_HABIT
    backbone: str = ""
    store: str = dataclasses.field(default="", compare=False)
    command: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_size > MOST_CODES:
            raise UserError(f"a codebook of {self.codebook_size} codes does not fit uint16; at most {MOST_CODES}")
        in_range("k", self.k, 1, MOST_NEIGHBORS)
        in_range("store_images", self.store_images, 0, MOST_IMAGES)

    def shard_files(self, shard: int) -> dict[str, str]:
        """Returns kind of content → file name for a shard; the only kind is "neighbors"."""
        return {"neighbors": f"neighbors-{self.place(shard)}.arrayrecord"}


@dataclasses.dataclass(frozen=True)
class NeighborSet(ShardFolder):
    """A complete, opened set: a random-access source for Grain; any number of threads may read it."""

    settings: NeighborSettings

    noun: ClassVar[str] = "neighbor set"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = NeighborSettings
    command: ClassVar[str] = "build_neighbors"

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grids, [H, W]."""
        return self.settings.grid

    @property
    def codebook_size(self) -> int:
        """V, the number of codes in the codebook."""
        return self.settings.codebook_size

    @property
    def k(self) -> int:
        """Neighbours per position."""
        return self.settings.k

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns image ``i``: "codes" int32 [T], "neighbors" int32 [T, K] nearest first (-1 = empty), "caption"."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        with reading(self._file_of(i), "", self.rebuild):
            codes, neighbors, caption = from_record(self._records[i], self.grid[0] * self.grid[1], self.k)
            if codes.max() >= self.codebook_size or neighbors.max() >= self.codebook_size:
                raise ValueError(f"image {i} has codes outside a codebook of {self.codebook_size}")
            if "\0" in caption:  # the record holds more numbers than the settings say
                raise ValueError(f"image {i} has a record that does not fit a grid of {self.grid} with k={self.k}")
        return {"codes": codes, "neighbors": neighbors, "caption": caption}

    def verify(self) -> None:
        """Checks every file's SHA-256, and that the first record has the shape given by the settings."""
        super().verify()
        if len(self):
            self[0]

    def _file_of(self, i: int) -> Path:
        """Returns the path of the file that holds image ``i``."""
        return self.directory / self._names[bisect.bisect_right(self._ends, i)]

    @functools.cached_property
    def _names(self) -> list[str]:
        """The names of the shards' files, in order."""
        return [self.settings.shard_files(shard)["neighbors"] for shard in range(self.settings.num_shards)]

    @functools.cached_property
    def _ends(self) -> list[int]:
        """For each shard, the number of its last image plus one."""
        return list(itertools.accumulate(self.files[name]["images"] for name in self._names))

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        """The records of all shards; a file is opened on first use, under a lock."""
        return ArrayRecordDataSource([str(self.directory / name) for name in self._names])


def to_record(codes: Integer[np.ndarray, " T"], neighbors: Int[np.ndarray, "T K"], caption: bytes) -> bytes:
    """Returns an image's record.

    Codes are in [0, ``MOST_CODES``), neighbours in [-1, ``MOST_CODES``); the caption is UTF-8.
    """
    return codes.astype("<u2").tobytes() + (neighbors + 1).astype("<u2").tobytes() + caption


def from_record(record: bytes, positions: int, k: int) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, "T K"], str]:
    """Returns codes int32 [T], neighbours int32 [T, K] and the caption of a record; T is ``positions``."""
    numbers = np.frombuffer(record, "<u2", positions * (1 + k)).astype(np.int32)
    return numbers[:positions], numbers[positions:].reshape(positions, k) - 1, record[2 * numbers.size :].decode()


def set_in(path: str, name: str) -> str:
    """Returns the path of a neighbour set in what ``build_neighbors`` has written: a folder, an id or an address."""
    if object_storage.is_address(path):
        return f"{path}/{name}"
    if not huggingface.is_id(path):
        return str(Path(path) / name)
    of = huggingface.parse_id(path, "neighbors", huggingface.DATASET)
    return str(dataclasses.replace(of, part=f"{of.part}/{name}" if of.part else name))
