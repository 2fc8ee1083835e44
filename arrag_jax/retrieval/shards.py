"""A folder of shards and its manifest: what a datastore and a neighbour set have in common.

It is built shard by shard: stop it at any moment, run it again, and the bytes are the same. A shard's files
appear whole (``files.whole_file``), the manifest last. ``building.json`` holds the settings of an unfinished
build, so that one with other settings never mixes with it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from arrag_jax import config as config_lib
from arrag_jax.errors import UserError
from arrag_jax.files import explained, only_writer, sha256_of, whole_file, write_json

MANIFEST = "manifest.json"
BUILDING = "building.json"

Folder = TypeVar("Folder")


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """Base of the frozen dataclasses that say what a folder holds; all their fields stand in its manifest.

    Fields made with ``compare=False`` are records: two builds may differ in them.

    Attributes:
      fingerprint: of the tokenizer that made the codes.
      grid: [H, W].
      codebook_size: V.
      num_images: images, all shards together.
      shard_size: images a shard; the last may hold fewer.
      source, split: the dataset the images came from.
      other_files: names of the files that belong to no shard.
    """

    fingerprint: str
    grid: tuple[int, int]
    codebook_size: int
    num_images: int
    shard_size: int
    source: str
    split: str
    other_files: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.num_images < 1 or self.shard_size < 1:
            raise UserError(f"num_images={self.num_images} and shard_size={self.shard_size} must be at least 1")

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """Numbers of the images in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of each part of a shard."""
        raise NotImplementedError

    def place(self, shard: int) -> str:
        """How a shard is numbered in its files' names."""
        return f"{shard:05d}-of-{self.num_shards:05d}"


@dataclasses.dataclass(frozen=True)
class ShardFolder:
    """A whole folder, opened.

    Attributes:
      directory: where it lies.
      settings: what it holds.
      files: name → {"sha256", "bytes", "images"} of every file but the manifest.
      num_images: how many images count, the first ones.
    """

    directory: Path
    settings: Any
    files: dict[str, dict]
    num_images: int

    noun: ClassVar[str]  # what messages call it
    format_version: ClassVar[int]
    settings_class: ClassVar[type[ShardSettings]]
    rebuild: ClassVar[str]  # how a user mends a missing or damaged one

    @classmethod
    def open(cls: type[Folder], directory: str | Path) -> Folder:
        """Opens a folder after checking its manifest and the size of every file.

        Raises:
          UserError: no such folder here, an unfinished one, another format, or a missing or truncated file.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise UserError(f"no finished {cls.noun} in {directory} ({MANIFEST} is missing); {cls.rebuild}")
        try:
            manifest = json.loads(path.read_text())
            version = manifest["format_version"]
            if version != cls.format_version:
                raise UserError(f"{path} has format {version}, this code reads {cls.format_version}; {cls.rebuild}")
            settings = config_lib.parse(cls.settings_class, manifest["settings"], f"{path}: settings")
            sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the manifest of a {cls.noun} ({error!r}); {cls.rebuild}") from error
        for name, expected in sizes.items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else "no"
            if size != expected:
                raise UserError(f"{directory / name} has {size} bytes, not {expected}; {cls.rebuild}")
        return cls(directory, settings, manifest["files"], settings.num_images)

    def verify(self) -> None:
        """Checks every file's SHA-256 (reads them all).

        Raises:
          UserError: naming the first file whose content is not what was written.
        """
        for name, facts in self.files.items():
            if sha256_of(self.directory / name) != facts["sha256"]:
                raise UserError(
                    f"{self.directory / name} is damaged: its SHA-256 is not the manifest's; {self.rebuild}"
                )

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless the tokenizer with this fingerprint made the codes."""
        if fingerprint != self.settings.fingerprint:
            raise UserError(
                f"{self.noun} {self.directory} was made by tokenizer {self.settings.fingerprint}, "
                f"the model has {fingerprint}; use that tokenizer's model, or {self.rebuild}"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: two folders share it only if they hold the same bytes."""
        return sha256_of(self.directory / MANIFEST)


def build(
    kind: type[ShardFolder],
    directory: str | Path,
    settings: ShardSettings,
    write_shard: Callable[[int, tqdm], None],
    begin: Callable[[], None] = lambda: None,
) -> ShardFolder:
    """Builds a folder in ``directory``, or goes on with it, or finds it whole.

    Args:
      kind: of folder.
      directory: made if absent.
      settings: what to build.
      write_shard: writes the files of one shard and counts its images on the bar as it goes.
      begin: called once before the shards; writes ``settings.other_files``.

    Raises:
      UserError: another folder or build in the directory (nothing is touched), or a disk that is full.
    """
    directory = Path(directory)
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory):
        if require_same_settings(kind, directory, settings) != "whole":
            if (directory / BUILDING).exists():
                settings = _read_building(kind, directory)  # the records of the run that began it
            else:
                write_json(directory / BUILDING, dataclasses.asdict(settings))
            begin()
            _write_shards(directory, settings, write_shard)
            _write_manifest(kind, directory, settings)
        (directory / BUILDING).unlink(missing_ok=True)
    return kind.open(directory)


def require_same_settings(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> str:
    """What lies in the directory: "nothing", "begun" or "whole".

    Raises:
      UserError: a folder or an unfinished build of other settings, or other files.
    """
    if (directory / MANIFEST).exists():
        state, found = "whole", kind.open(directory).settings
    elif (directory / BUILDING).exists():
        state, found = "begun", _read_building(kind, directory)
    else:
        # a kill before building.json was renamed may leave its temporary file
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise UserError(f"{directory} holds other files and no {kind.noun}; choose an empty --workdir")
        return "nothing"
    fields = [field.name for field in dataclasses.fields(settings) if field.compare]
    differ = [
        f"{x}: {getattr(found, x)!r}, not {getattr(settings, x)!r}"
        for x in fields
        if getattr(found, x) != getattr(settings, x)
    ]
    if differ:
        raise UserError(
            f"{directory} holds a {kind.noun} of other settings ({'; '.join(differ)}); choose another --workdir"
        )
    return state


def write_records(path: Path, records: Iterable[bytes], options: str) -> None:
    """One ArrayRecord file, whole or not at all; ``options`` as ``ArrayRecordWriter`` takes them."""
    with whole_file(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), options)
        for record in records:
            writer.write(record)
        writer.close()


def _read_building(kind: type[ShardFolder], directory: Path) -> Any:
    path = directory / BUILDING
    try:
        return config_lib.parse(kind.settings_class, json.loads(path.read_text()), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); choose another --workdir") from error


def _write_shards(directory: Path, settings: ShardSettings, write_shard: Callable[[int, tqdm], None]) -> None:
    """Writes every shard that is not there yet."""
    missing = [
        shard
        for shard in range(settings.num_shards)
        if not all((directory / name).exists() for name in settings.shard_files(shard).values())
    ]
    done = settings.num_images - sum(len(settings.shard_images(shard)) for shard in missing)
    with tqdm(total=settings.num_images, initial=done, unit="image", desc=str(directory), dynamic_ncols=True) as bar:
        for shard in missing:
            write_shard(shard, bar)


def _write_manifest(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> None:
    """Hashes every file and writes the manifest, which makes the folder whole."""
    images = dict.fromkeys(settings.other_files, 0)
    for shard in range(settings.num_shards):
        images |= dict.fromkeys(settings.shard_files(shard).values(), len(settings.shard_images(shard)))
    files = {}
    for name, count in images.items():
        path = directory / name
        files[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size, "images": count}
    manifest = {"format_version": kind.format_version, "settings": dataclasses.asdict(settings), "files": files}
    write_json(directory / MANIFEST, manifest)
