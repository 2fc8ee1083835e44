"""A folder of shards and its manifest, the common base of a datastore and a neighbour set.

``manifest.json`` is written last, so that a folder that has it is complete. It says what the folder holds, the size and
SHA-256 of every other file, and the SHA-256 of its own content. ``building`` builds such folders.
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
from arrag_jax.remote import local_copy
from arrag_jax.store.skipped import BAD_FILES, LEFT_OUT, bad_line, counts_of, read_bad

MANIFEST = "manifest.json"
MOST_IMAGES = 2**40

Folder = TypeVar("Folder", bound="ShardFolder")


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """Base of the frozen dataclasses that say what a folder holds; the manifest stores all their fields.

    Fields with ``compare=False`` are records: two builds of the same folder may differ in them.

    Attributes:
      fingerprint: identity of the tokenizer that made the codes.
      grid: [H, W].
      codebook_size: V.
      num_images: number of images that all shards process together, including those that are left out.
      shard_size: images per shard; the last shard may have fewer.
      source, split: the source of the images, and its split.
      origin: absolute path of the folder or tar, with links resolved; "" for a data set and for folders older than this
        field. A record.
      beside: ending → number of files found that hold no image. A record.
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
        """The absolute path of the source's files if it was recorded, else ``source``."""
        return self.origin or self.source

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """Returns the numbers of the images that a shard processes."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def shard_files(self, shard: int) -> dict[str, str]:
        """Returns kind of content → file name for a shard; the shard is done when all these files exist."""
        raise NotImplementedError

    def bad_file(self, shard: int) -> str:
        """Returns the name of the file that lists the images left out of a shard; it exists only if there are any."""
        return BAD_FILES.replace("*", self.place(shard))

    def shard_counts(self, directory: Path, shard: int) -> dict[str, dict[str, int]]:
        """Returns file name → counts for a finished shard, as the manifest stores them; see ``FileFacts``."""
        path = directory / self.bad_file(shard)
        left_out = [reason for _, reason in read_bad(path)] if path.exists() else []
        counts = {"images": len(self.shard_images(shard)) - len(left_out)}
        files = {name: counts for name in self.shard_files(shard).values()}
        return files | ({path.name: counts_of(left_out)} if left_out else {})

    def place(self, shard: int) -> str:
        """Returns the number of a shard as its file names spell it."""
        return f"{shard:05d}-of-{self.num_shards:05d}"


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A manifest's facts about one file: size, hash, number of images it holds, and numbers of images left out."""

    sha256: str
    bytes: int
    images: int
    bad: int = 0
    passed_over: int = 0
    duplicates: int = 0
    told: int = 0  # images left out that an earlier store of the same merge lists

    def __post_init__(self):
        for name in ("bytes", "images", "told", *LEFT_OUT):
            in_range(name, getattr(self, name), 0, MOST_IMAGES)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The parsed fields of ``manifest.json``; a folder's ``settings_class`` is the schema of ``settings``."""

    settings: Any
    files: dict[str, FileFacts]
    parts: dict[str, str] = dataclasses.field(default_factory=dict)  # folder of each segment → its fingerprint
    sha256: str = ""  # hash of all other fields; absent in the oldest manifests

    def __post_init__(self):
        for name in (*self.files, *self.parts):
            require_inside(name)

    def require_files_of(self, settings: ShardSettings) -> None:
        """Raises UserError unless the files and their image counts match the settings."""
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
    """A complete, opened folder.

    Attributes:
      directory: the path of the folder.
      settings: what it holds.
      manifest: the content of ``manifest.json``.
      num_images: number of visible images, the first ones of the folder.
    """

    directory: Path
    settings: Any
    manifest: dict[str, Any]
    num_images: int

    noun: ClassVar[str]  # the name of this kind of folder in messages
    format_version: ClassVar[int]
    settings_class: ClassVar[type[ShardSettings]]
    command: ClassVar[str]  # the command that builds one
    rebuild: ClassVar[str]  # advice for a damaged folder, in messages

    def __init_subclass__(cls):
        again = f"python -m arrag_jax.{cls.command} --config=… --workdir=… (in manifest.json)"
        cls.rebuild = f"build it with: {again}, once its folder is deleted"

    @classmethod
    def open(cls: type[Folder], directory: str | Path) -> Folder:
        """Opens a folder after checking its manifest and the size of every file.

        Raises:
          UserError: if there is no such folder, it is unfinished or of another format, its manifest contradicts itself,
            or a file is missing or has the wrong size.
        """
        directory = Path(local_path(local_copy(directory, MANIFEST), cls.noun))
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
        """Returns the number of images in the folder's own shards, without those left out."""
        names = [next(iter(settings.shard_files(shard).values())) for shard in range(settings.num_shards)]
        return sum(manifest["files"][name]["images"] for name in names)

    @property
    def files(self) -> dict[str, dict]:
        """Name → {"sha256", "bytes", "images"} for every file except the manifest."""
        return self.manifest["files"]

    @property
    def num_bad(self) -> int:
        """Number of images that could not be read."""
        return sum(facts.get("bad", 0) for facts in self.files.values())

    @property
    def num_duplicates(self) -> int:
        """Number of images left out as duplicates."""
        return sum(facts.get("duplicates", 0) for facts in self.files.values())

    @property
    def bad(self) -> list[tuple[str, str]]:
        """The (image id, reason) of each image left out: unreadable ones, ones passed over, and duplicates."""
        names = [name for name, facts in self.files.items() if "bad" in facts]
        return [bad_line(line) for name in names for line in self.lines_of(name)]

    def lines_of(self, name: str) -> list[str]:
        """Returns the lines of one of the folder's text files after checking the file's hash.

        Raises:
          UserError: if the file is damaged.
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
        """The command that checks the whole folder for damage; "" if there is none."""
        return ""

    def verify(self) -> None:
        """Checks the SHA-256 of every file; reads all of them.

        Raises:
          UserError: if a file is damaged; the message names the first one.
        """
        self.require_manifest()
        for name, facts in self.files.items():
            if sha256_of(self.directory / name) != facts["sha256"]:
                raise UserError(
                    f"{self.directory / name} is damaged: its SHA-256 is not the manifest's; {self.rebuild}"
                )

    def require_manifest(self) -> None:
        """Raises UserError if the manifest's content does not match its own hash (the oldest manifests have none)."""
        if self.manifest.get("sha256", content_hash(self.manifest)) != content_hash(self.manifest):
            raise UserError(f"{self.directory / MANIFEST} is damaged: it is not what was written; {self.rebuild}")

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless a tokenizer with this fingerprint made the codes."""
        if fingerprint != self.settings.fingerprint:
            own = shown(self.settings.fingerprint)[1:-1]
            raise UserError(
                f"{self.noun} {self.directory} was made by tokenizer {own}, "
                f"the model has {fingerprint}; use that tokenizer's model, or build another with: python -m "
                f"arrag_jax.{self.command} --config=… --config.model=… --workdir=…"
            )

    @functools.cached_property
    def store_fingerprint(self) -> str:
        """SHA-256 of the manifest; folders with equal fingerprints hold the same bytes."""
        return sha256_of(self.directory / MANIFEST)


def require_inside(name: str) -> None:
    """Raises UserError unless ``name`` is a plain name, without a path, of a file or folder inside this folder."""
    if name in ("", ".", "..") or len(name.encode()) > 255 or "/" in name or not name.isprintable():
        raise UserError(f"files: {shown(name)} is not the name of a file inside this folder")


def require_count(found: Sized, expected: int) -> None:
    """Raises ValueError unless a file holds the number of images that its manifest says."""
    if len(found) != expected:
        raise ValueError(f"it holds {len(found)} images, not {expected}")


def require_digest(digest: str, facts: dict[str, Any]) -> None:
    """Raises ValueError unless a file's SHA-256 equals the one in the manifest."""
    if digest != facts["sha256"]:
        raise ValueError("its SHA-256 is not the manifest's")


@contextlib.contextmanager
def reading(path: Path, verify: str, rebuild: str) -> Iterator[None]:
    """Turns the exceptions of reading a damaged file into a UserError of one line.

    Args:
      path: the file that is read; the message names it.
      verify: the command that shows further damage; "" if there is none.
      rebuild: the advice at the end of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each reader raises other exceptions
        if is_of_the_machine(error):
            raise
        see = f"to see what else is, run: {verify}; " if verify else ""
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {see}{rebuild}") from error


def facts_of(path: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns the manifest's facts about a file, with these counts of ``FileFacts``; reads the whole file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size, **counts}


def content_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest without its own hash."""
    return {key: value for key, value in manifest.items() if key != "sha256"}


def content_hash(manifest: dict[str, Any]) -> str:
    """Returns the hex SHA-256 of a manifest's content without its own hash."""
    return hashlib.sha256(json.dumps(content_of(manifest), sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes ``manifest.json`` with its hash; this marks the folder as complete."""
    write_json(directory / MANIFEST, {**content, "sha256": content_hash(content)})
