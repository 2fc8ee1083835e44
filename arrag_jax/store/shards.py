"""A folder of shards and its manifest: what a datastore and a neighbour set have in common.

``manifest.json`` is written last, so that a folder is whole when it is there; it tells what the folder holds, and
the size and SHA-256 of every other file and of its own content. How one is built stands in ``building``.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from arrag_jax.errors import UserError
from arrag_jax.failures import is_of_the_machine
from arrag_jax.fields import local_path
from arrag_jax.files import sha256_of, write_json
from arrag_jax.json_files import read_object
from arrag_jax.ops.grid import MOST_SIDE
from arrag_jax.parsing import in_range, parse, shown
from arrag_jax.store.skipped import BAD_FILES, LEFT_OUT, bad_line, counts_of, read_bad

MANIFEST = "manifest.json"
MOST_IMAGES = 2**40

Folder = TypeVar("Folder", bound="ShardFolder")


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
      origin: where files were found, as a whole path without links; "" of a data set and of folders made before it was
        recorded. A record.
      beside: how many files of each ending were found that hold no image. A record.
      other_files: names of the files that belong to no shard.
    """

    fingerprint: str
    grid: tuple[int, int]
    codebook_size: int
    num_images: int
    shard_size: int
    source: str
    split: str
    origin: str = dataclasses.field(default="", compare=False, kw_only=True)
    beside: dict[str, int] = dataclasses.field(default_factory=dict, compare=False, kw_only=True)
    other_files: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.num_images < 1 or self.shard_size < 1:
            raise UserError(f"num_images={self.num_images} and shard_size={self.shard_size} must be at least 1")
        for name in ("num_images", "shard_size"):
            in_range(name, getattr(self, name), 1, MOST_IMAGES)
        for side in self.grid:
            in_range("a side of grid", side, 1, MOST_SIDE)
        in_range("codebook_size", self.codebook_size, 1, 2**31)

    @property
    def found_in(self) -> str:
        """Where its files were found, as exactly as is known; the name of a data set."""
        return self.origin or self.source

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """Numbers of the images that a shard goes through."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of each kind of content of a shard; a shard is done when all are there."""
        raise NotImplementedError

    def bad_file(self, shard: int) -> str:
        """Name of the file that tells which images of a shard are bad; there if any are."""
        return BAD_FILES.replace("*", self.place(shard))

    def shard_counts(self, directory: Path, shard: int) -> dict[str, dict[str, int]]:
        """What the manifest says of a shard that is done: images in each file, in the file of bad ones how many."""
        path = directory / self.bad_file(shard)
        left_out = [reason for _, reason in read_bad(path)] if path.exists() else []
        counts = {"images": len(self.shard_images(shard)) - len(left_out)}
        files = {name: counts for name in self.shard_files(shard).values()}
        return files | ({path.name: counts_of(left_out)} if left_out else {})

    def place(self, shard: int) -> str:
        """How a shard is numbered in its files' names."""
        return f"{shard:05d}-of-{self.num_shards:05d}"


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file: size, hash, how many images it holds, and how many it lists as left out."""

    sha256: str
    bytes: int
    images: int
    bad: int = 0
    passed_over: int = 0
    duplicates: int = 0
    told: int = 0  # left out, and listed by the store that this one was merged behind

    def __post_init__(self):
        for name in ("bytes", "images", "told", *LEFT_OUT):
            in_range(name, getattr(self, name), 0, MOST_IMAGES)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is read of ``manifest.json``; a folder's ``settings_class`` is the schema of its ``settings``."""

    settings: Any
    files: dict[str, FileFacts]
    parts: dict[str, str] = dataclasses.field(default_factory=dict)  # folder of each segment → its fingerprint
    sha256: str = ""  # of all the rest; absent in the oldest ones

    def __post_init__(self):
        for name in (*self.files, *self.parts):
            require_inside(name)

    def require_files_of(self, settings: ShardSettings) -> None:
        """Raises UserError unless the files are those of a folder of these settings, with as many images."""
        if settings.num_shards > len(self.files):
            raise UserError(f"files: {len(self.files)} files cannot be {settings.num_shards} shards")
        for name in settings.other_files:
            self._facts(name)
        for shard in range(settings.num_shards):
            listed = self.files.get(settings.bad_file(shard), FileFacts("", 0, 0))
            left_out = sum(getattr(listed, kind) for kind in LEFT_OUT)
            for name in settings.shard_files(shard).values():
                facts = self._facts(name)
                expected = len(settings.shard_images(shard)) - left_out - facts.told
                if facts.images != expected:
                    raise UserError(f"files.{name} has {facts.images} images, its settings give it {expected}")

    def _facts(self, name: str) -> FileFacts:
        if name not in self.files:
            raise UserError(f"files: {name} is missing")
        return self.files[name]


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
          UserError: no such folder here, an unfinished one, another format, a manifest that contradicts itself, or a
            missing or truncated file.
        """
        directory = Path(local_path(directory, cls.noun))
        path = directory / MANIFEST
        if not path.is_file():
            raise UserError(
                f"no finished {cls.noun} in {directory} ({MANIFEST} is missing); build it with: python -m "
                f"arrag_jax.{cls.command} --config=CONFIG --workdir={directory}"
            )
        manifest = read_object(path)
        version = manifest.get("format_version")
        if type(version) is int and version != cls.format_version:
            raise UserError(f"{path} has format {shown(version)}, this code reads {cls.format_version}; {cls.rebuild}")
        try:
            if type(version) is not int:
                raise UserError(f"it has format_version {shown(version)}")
            read = parse(Manifest, manifest, str(path), ignore_unknown=True)
            settings = parse(cls.settings_class, read.settings, f"{path}: settings")
            read.require_files_of(settings)
        except UserError as error:
            raise UserError(f"{path} is not the manifest of a {cls.noun}: {error}; {cls.rebuild}") from error
        for name, facts in read.files.items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else "no"
            if size != facts.bytes:
                raise UserError(f"{directory / name} has {size} bytes, not {facts.bytes}; {cls.rebuild}")
        return cls(directory, settings, manifest, cls.count_images(settings, manifest))

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
    def num_duplicates(self) -> int:
        """Images that were left out because they are there already."""
        return sum(facts.get("duplicates", 0) for facts in self.files.values())

    @property
    def bad(self) -> list[tuple[str, str]]:
        """What was left out (what could not be read, what was passed over, duplicates), and why."""
        names = [name for name, facts in self.files.items() if "bad" in facts]
        return [bad_line(line) for name in names for line in self.lines_of(name)]

    def lines_of(self, name: str) -> list[str]:
        """The lines of one of the folder's text files, whose hash is checked.

        Raises:
          UserError: the file is not what was written.
        """
        path, facts = self.directory / name, self.files[name]
        with reading(path, self.verify_command, self.rebuild):
            content = path.read_bytes()
            lines = content.decode().split("\n")[:-1]
            require_count(lines, facts["images"] + sum(facts.get(kind, 0) for kind in LEFT_OUT))
            require_digest(hashlib.sha256(content).hexdigest(), facts)
        return lines

    @property
    def verify_command(self) -> str:
        """How a user sees what else is damaged; "" where no command tells."""
        return ""

    def verify(self) -> None:
        """Checks every file's SHA-256 (reads them all).

        Raises:
          UserError: naming the first file whose content is not what was written.
        """
        self.require_manifest()
        for name, facts in self.files.items():
            if sha256_of(self.directory / name) != facts["sha256"]:
                raise UserError(
                    f"{self.directory / name} is damaged: its SHA-256 is not the manifest's; {self.rebuild}"
                )

    def require_manifest(self) -> None:
        """Raises UserError unless the manifest is what was written, by its own hash (the oldest ones have none)."""
        if self.manifest.get("sha256", content_hash(self.manifest)) != content_hash(self.manifest):
            raise UserError(f"{self.directory / MANIFEST} is damaged: it is not what was written; {self.rebuild}")

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless the tokenizer with this fingerprint made the codes."""
        if fingerprint != self.settings.fingerprint:
            own = shown(self.settings.fingerprint)[1:-1]
            raise UserError(
                f"{self.noun} {self.directory} was made by tokenizer {own}, "
                f"the model has {fingerprint}; use that tokenizer's model, or build another with: python -m "
                f"arrag_jax.{self.command} --config=… --config.model=… --workdir=…"
            )

    @functools.cached_property
    def store_fingerprint(self) -> str:
        """SHA-256 of the manifest: two folders share it only if they hold the same bytes."""
        return sha256_of(self.directory / MANIFEST)


def require_inside(name: str) -> None:
    """Raises UserError unless a name is that of a file or folder directly inside the folder that names it."""
    if name in ("", ".", "..") or len(name.encode()) > 255 or "/" in name or not name.isprintable():
        raise UserError(f"files: {shown(name)} is not the name of a file inside this folder")


def require_count(found: Sized, expected: int) -> None:
    """Raises ValueError unless a file holds as many images as its manifest says."""
    if len(found) != expected:
        raise ValueError(f"it holds {len(found)} images, not {expected}")


def require_digest(digest: str, facts: dict[str, Any]) -> None:
    """Raises ValueError unless a file's SHA-256 is the manifest's."""
    if digest != facts["sha256"]:
        raise ValueError("its SHA-256 is not the manifest's")


@contextlib.contextmanager
def reading(path: Path, verify: str, rebuild: str) -> Iterator[None]:
    """Turns what a damaged file raises into one line: it, what tells of more (``verify``, "" = nothing), the mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each reader has its own
        if is_of_the_machine(error):
            raise
        see = f"to see what else is, run: {verify}; " if verify else ""
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {see}{rebuild}") from error


def facts_of(path: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """What the manifest says of a file, with these counts of ``FileFacts``; reads all of it."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size, **counts}


def content_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """All that a manifest says but its own hash."""
    return {key: value for key, value in manifest.items() if key != "sha256"}


def content_hash(manifest: dict[str, Any]) -> str:
    """Hex SHA-256 of ``content_of`` a manifest."""
    return hashlib.sha256(json.dumps(content_of(manifest), sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes ``manifest.json`` with its hash; what was not whole before now is."""
    write_json(directory / MANIFEST, {**content, "sha256": content_hash(content)})
