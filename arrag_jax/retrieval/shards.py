"""A folder of shards and its manifest: what a datastore and a neighbour set have in common.

``manifest.json`` is written last, so that a folder is whole when it is there; it tells what the folder holds, and
the size and SHA-256 of every other file and of its own content. How one is built stands in ``building``.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from arrag_jax.errors import UserError
from arrag_jax.fields import local_path
from arrag_jax.files import sha256_of, write_json
from arrag_jax.parsing import parse

MANIFEST = "manifest.json"
BAD_FILES = "bad-*.txt"

Folder = TypeVar("Folder")


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """Base of the frozen dataclasses that say what a folder holds; all their fields stand in its manifest.

    Fields made with ``compare=False`` are records: two builds may differ in them.

    Attributes:
      fingerprint: of the tokenizer that made the codes.
      grid: [H, W].
      codebook_size: V.
      num_images: images gone through, all shards together; the bad ones are left out.
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
        """Numbers of the images that a shard goes through."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of each part of a shard; a shard is done when all are there."""
        raise NotImplementedError

    def bad_file(self, shard: int) -> str:
        """Name of the file that tells which images of a shard are bad; there if any are."""
        return BAD_FILES.replace("*", self.place(shard))

    def shard_counts(self, directory: Path, shard: int) -> dict[str, dict[str, int]]:
        """What the manifest says of a shard that is done: images in each file, in the file of bad ones how many."""
        bad = directory / self.bad_file(shard)
        number = len(read_lines(bad)) if bad.exists() else 0
        images = len(self.shard_images(shard)) - number
        counts = {name: {"images": images} for name in self.shard_files(shard).values()}
        return counts | ({bad.name: {"images": 0, "bad": number}} if number else {})

    def place(self, shard: int) -> str:
        """How a shard is numbered in its files' names."""
        return f"{shard:05d}-of-{self.num_shards:05d}"


@dataclasses.dataclass(frozen=True)
class ShardFolder:
    """A whole folder, opened.

    Attributes:
      directory: where it lies.
      settings: what it holds.
      manifest: all that ``manifest.json`` says.
      num_images: how many images count, the first ones.
    """

    directory: Path
    settings: Any
    manifest: dict[str, Any]
    num_images: int

    noun: ClassVar[str]  # what messages call it
    format_version: ClassVar[int]
    settings_class: ClassVar[type[ShardSettings]]
    command: ClassVar[str]  # that builds one
    rebuild: ClassVar[str]  # how a user mends a damaged one

    @classmethod
    def open(cls: type[Folder], directory: str | Path) -> Folder:
        """Opens a folder after checking its manifest and the size of every file.

        Raises:
          UserError: no such folder here, an unfinished one, another format, or a missing or truncated file.
        """
        directory = Path(local_path(directory, cls.noun))
        path = directory / MANIFEST
        if not path.is_file():
            raise UserError(
                f"no finished {cls.noun} in {directory} ({MANIFEST} is missing); build it with: python -m "
                f"arrag_jax.{cls.command} --config=CONFIG --workdir={directory}"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["format_version"]
            if version != cls.format_version:
                raise UserError(f"{path} has format {version}, this code reads {cls.format_version}; {cls.rebuild}")
            settings = parse(cls.settings_class, manifest["settings"], f"{path}: settings")
            sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
            num_images = cls.count_images(settings, manifest)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the manifest of a {cls.noun} ({error!r}); {cls.rebuild}") from error
        for name, expected in sizes.items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else "no"
            if size != expected:
                raise UserError(f"{directory / name} has {size} bytes, not {expected}; {cls.rebuild}")
        return cls(directory, settings, manifest, num_images)

    @classmethod
    def count_images(cls, settings: ShardSettings, manifest: dict[str, Any]) -> int:
        """Images in the folder's own shards, without the bad ones."""
        names = [next(iter(settings.shard_files(shard).values())) for shard in range(settings.num_shards)]
        return sum(manifest["files"][name]["images"] for name in names)

    @property
    def files(self) -> dict[str, dict]:
        """Name → {"sha256", "bytes", "images"} of every file but the manifest."""
        return self.manifest["files"]

    @property
    def num_bad(self) -> int:
        """Images that could not be read."""
        return sum(facts.get("bad", 0) for facts in self.files.values())

    @property
    def bad(self) -> list[tuple[str, str]]:
        """What could not be read, and why."""
        names = [name for name, facts in self.files.items() if "bad" in facts]
        return [line for name in names for line in read_bad(self.directory / name)]

    def verify(self) -> None:
        """Checks every file's SHA-256 (reads them all).

        Raises:
          UserError: naming the first file whose content is not what was written.
        """
        if self.manifest.get("sha256", content_hash(self.manifest)) != content_hash(self.manifest):
            raise UserError(f"{self.directory / MANIFEST} is damaged: it is not what was written; {self.rebuild}")
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
                f"the model has {fingerprint}; use that tokenizer's model, or build another with: python -m "
                f"arrag_jax.{self.command} --config=… --config.model=… --workdir=…"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest: two folders share it only if they hold the same bytes."""
        return sha256_of(self.directory / MANIFEST)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of ours, each of which ends in a newline."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def read_bad(path: Path) -> list[tuple[str, str]]:
    """Image and reason from each line of a file of bad images."""
    return [(name, reason) for name, _, reason in (line.partition("\t") for line in read_lines(path))]


def content_hash(manifest: dict[str, Any]) -> str:
    """Hex SHA-256 of all that a manifest says but this hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes ``manifest.json`` with its hash; what was not whole before now is."""
    write_json(directory / MANIFEST, {**content, "sha256": content_hash(content)})
