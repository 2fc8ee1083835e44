"""Opens hidden keys: for each image of a store, the projected states of one backbone, and how well it knows the codes.

They stand in a folder of their own beside a store's files, ``hidden-`` and the backbone's fingerprint, so that keys of
several backbones can belong to one store::

  manifest.json                          what the folder holds; written last
  projection.npz                         "projection", the table of ``ops.keys.hidden``, float32 [D + 2, E]
  hidden-00000-of-00004.arrayrecord      one record per image; see ``ops.keys.hidden``

Each segment of a store has such a folder; all of them have one projection. ``hidden_building`` builds them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, UInt8

from arrag_jax.errors import UserError
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import Told
from arrag_jax.parsing import in_range
from arrag_jax.store.record_files import read_array, read_records
from arrag_jax.store.shards import MANIFEST, ShardFolder, ShardSettings, reading

PREFIX = "hidden-"
PROJECTION = "projection.npz"
MOST_NUMBERS = 120  # numbers per key; distances of more numbers could overflow (``ops.distances``)


@dataclasses.dataclass(frozen=True)
class HiddenSettings(ShardSettings):
    """The settings that determine a folder's content; its manifest holds them.

    Attributes (besides those of ``ShardSettings``):
      backbone: fingerprint of the backbone.
      width: D, the dimension of a state.
      numbers: E, the numbers per key.
      projection: SHA-256 of the projection's numbers.
      datastore: fingerprint of the segment that holds the images.
      batch_size: images per forward pass.
      model: folder of the backbone. A record, never compared.
    """

    backbone: str
    width: int
    numbers: int
    projection: str
    datastore: str
    batch_size: int
    model: str = dataclasses.field(default="", compare=False)
    other_files: ClassVar[tuple[str, ...]] = (PROJECTION,)

    def __post_init__(self):
        super().__post_init__()
        in_range("numbers", self.numbers, 1, MOST_NUMBERS)
        in_range("width", self.width, self.numbers, 2**20)

    def shard_files(self, shard: int) -> dict[str, str]:
        """Returns kind of content → file name for a shard; the only kind is "hidden"."""
        return {HIDDEN.file: f"hidden-{self.place(shard)}.arrayrecord"}

    @property
    def record_bytes(self) -> int:
        """Bytes of one image's record."""
        return HIDDEN.record_bytes(self.grid[0] * self.grid[1], self.numbers)


@dataclasses.dataclass(frozen=True)
class HiddenFolder(ShardFolder):
    """A complete, opened folder of the hidden keys of one segment."""

    settings: HiddenSettings

    noun: ClassVar[str] = "folder of hidden keys"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = HiddenSettings
    command: ClassVar[str] = "build_datastore"

    @functools.cached_property
    def table(self) -> Float[np.ndarray, "D2 E"]:
        """The projection."""
        path, shape = self.directory / PROJECTION, (self.settings.width + 2, self.settings.numbers)
        with reading(path, "", self.rebuild):
            table = read_array(path, "projection", shape, self.files[PROJECTION])
            if digest_of(table) != self.settings.projection:
                raise ValueError("it is not the projection that the manifest names")
        return table

    def records_of(self, first: int, end: int) -> UInt8[np.ndarray, "n R"]:
        """Returns the records of images ``first`` to ``end`` (exclusive)."""
        found = np.empty((end - first, self.settings.record_bytes), np.uint8)
        for shard in range(self.settings.num_shards):
            images = self.settings.shard_images(shard)
            inside = max(first, images.start), min(end, images.stop)
            if inside[0] < inside[1]:
                name = self.settings.shard_files(shard)[HIDDEN.file]
                wanted = slice(inside[0] - images.start, inside[1] - images.start)
                with reading(self.directory / name, "", self.rebuild):
                    found[inside[0] - first : inside[1] - first] = read_records(
                        self.directory / name, self.files[name], "<u1", found.shape[1:], wanted, check=True
                    )
        return found

    def told(self) -> Told:
        """Returns what the folder tells about its images' codes; only one shard's keys are in memory at a time."""
        images = map(self.settings.shard_images, range(self.settings.num_shards))
        return joined(HIDDEN.told(self.records_of(x.start, x.stop), self.settings.numbers) for x in images)


def joined(parts: Iterable[Told]) -> Told:
    """Returns what is told about the images of all parts."""
    return Told(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def digest_of(table: Float[np.ndarray, "D2 E"]) -> str:
    """Returns the SHA-256 of a projection's numbers."""
    return hashlib.sha256(np.ascontiguousarray(table, "<f4").tobytes()).hexdigest()


def folder_of(segment: Path, backbone: str) -> Path:
    """Returns the folder of a backbone's hidden keys beside the files of a segment."""
    return segment / f"{PREFIX}{backbone}"


def backbones_in(segment: Path) -> list[str]:
    """Returns the fingerprints of the backbones whose hidden keys a segment has."""
    return sorted(path.parent.name.removeprefix(PREFIX) for path in segment.glob(f"{PREFIX}*/{MANIFEST}"))


def open_hidden(
    segments: Sequence[tuple[Path, str]], backbone: str, further: Callable[..., str]
) -> tuple[HiddenFolder, ...]:
    """Returns the folder of a backbone's hidden keys for each segment of a store.

    Args:
      segments: the folder and the fingerprint of each segment; the first one is the store itself.
      backbone: fingerprint of the backbone; "" = no backbone is known.
      further: takes flags; returns the command that extends the store.

    Raises:
      UserError: if a folder is missing or damaged, belongs to other images, or has another projection than the first.
    """
    directory, mend = segments[0][0], f"add: {further('--config.keys=codebook,hidden')}"
    if not backbone:
        raise UserError(f"hidden keys of datastore {directory} need a backbone; give a model that has one")
    found: list[HiddenFolder] = []
    for segment, fingerprint in segments:
        if not (folder_of(segment, backbone) / MANIFEST).is_file():
            others = backbones_in(segment)
            held = f"hidden keys of backbone {', '.join(others)} alone" if others else "no hidden keys"
            raise UserError(
                f"datastore {segment} holds {held}, not those of backbone {backbone}; {mend} --config.model=MODEL"
            )
        folder = HiddenFolder.open(folder_of(segment, backbone))
        if folder.settings.datastore != fingerprint:
            raise UserError(f"{folder.directory} belongs to other images; delete it, and {mend}")
        if found and folder.settings.projection != found[0].settings.projection:
            raise UserError(
                f"{folder.directory} has another projection than {found[0].directory}; delete it, and {mend}"
            )
        found.append(folder)
    return tuple(found)


def records_of_all(folders: Sequence[HiddenFolder], first: int, end: int) -> UInt8[np.ndarray, "n R"]:
    """Returns the records of images ``first`` to ``end`` (exclusive), counted over all folders."""
    parts, before = [], 0
    for folder in folders:
        inside = max(first - before, 0), min(end - before, folder.num_images)
        if inside[0] < inside[1]:
            parts.append(folder.records_of(*inside))
        before += folder.num_images
    return np.concatenate(parts)
