"""Builds a folder of shards: stop it at any moment, run it again, and the bytes are the same.

``begun`` opens the build and ends it, ``Build.pending`` gives the shards that are still to be written; the loops over
them stand in ``writer``. A shard's files appear whole (``files.atomic_write``), the manifest last. ``building.json``
holds the settings of an unfinished build, so that one with other settings never mixes with it. Several processes take
the shards in turn.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from array_record.python.array_record_module import ArrayRecordWriter

from arrag_jax import progress, signals
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError, printable
from arrag_jax.files import atomic_write, exclusive_lock, write_errors, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import differences, parse
from arrag_jax.progress import Bar
from arrag_jax.store.encoding import Batch, EncodedImages
from arrag_jax.store.shards import MANIFEST, ShardFolder, ShardSettings, facts_of, write_manifest
from arrag_jax.store.skipped import SkipLimit, is_bad
from arrag_jax.store.workers import Workers

BUILDING = "building.json"
SHARD_SECONDS = 60.0  # most that a shard is given to be finished in after a signal; batch systems wait twice as long
Item = TypeVar("Item")


@contextlib.contextmanager
def begun(
    kind: type[ShardFolder],
    directory: Path,
    images: EncodedImages,
    settings: ShardSettings,
    limit: SkipLimit,
    workers: Workers | None = None,
) -> Iterator["Build"]:
    """Begins to build a folder in ``directory``, or goes on with it, or finds it whole; on leaving it is whole.

    Args:
      kind: of folder.
      directory: made if absent.
      images: at least ``settings.num_images`` (any, if the folder is whole); the first ones are taken.
      settings: what to build.
      limit: how many images may be bad.
      workers: the processes that build it together, all on the same file system; None = this one alone.

    Raises:
      UserError: too few images or too many bad ones, another folder or build in the directory (nothing is touched), a
        disk that is full, or the end of another one of the processes.
    """
    workers = workers or Workers(directory, 0, 1)
    if require_same_settings(kind, directory, settings) != "whole":
        images.require(settings)
    if not workers.leads:
        workers.wait_until(lambda: require_same_settings(kind, directory, settings) != "nothing")
        yield Build(directory, images, settings, limit, workers, is_whole=(directory / MANIFEST).exists())
        workers.wait_until((directory / MANIFEST).exists)
        return
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        is_whole = require_same_settings(kind, directory, settings) == "whole"
        if not is_whole and (directory / BUILDING).exists():
            settings = read_building(kind, directory)  # the records of the run that began it
        elif not is_whole:
            write_json(directory / BUILDING, dataclasses.asdict(settings))
        build = Build(directory, images, settings, limit, workers, is_whole)
        yield build
        if not is_whole:
            workers.wait_until(lambda: not missing_shards(directory, settings))
            build.require_few_bad()
            write_manifest(directory, _manifest(kind, directory, settings))
        (directory / BUILDING).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Build:
    """A folder that is being built; see ``begun``."""

    directory: Path
    images: EncodedImages
    settings: ShardSettings
    limit: SkipLimit
    workers: Workers
    is_whole: bool

    @property
    def leads(self) -> bool:
        """Is there something to build, and is this the process that writes what belongs to no shard?"""
        return self.workers.leads and not self.is_whole

    def pending(self) -> Iterator["Shard"]:
        """Yields the shards of this process of which a file is not there yet, each to be written by the caller."""
        if self.is_whole:
            return
        own = self.workers.share(range(self.settings.num_shards))
        missing = sorted(set(own) & set(missing_shards(self.directory, self.settings)))
        counts = {number: len(self.settings.shard_images(number)) for number in own}
        for number, bar in in_turn(counts, missing, str(self.directory), self.workers):
            shard = Shard(self, number, bar)
            # A killed run's file: what was bad then may be good by now.
            shard.bad_file.unlink(missing_ok=True)
            yield shard
            self.require_few_bad()

    def require_few_bad(self) -> None:
        """Raises UserError if more images are known to be bad than is allowed."""
        self.limit.require_few(self.directory, self.settings.num_images)


class Shard:
    """A shard that is being written.

    Attributes:
      files: path of each file, by the kind of its content.
      bad_file: path of the file that lists what is left out; there if anything is.
    """

    def __init__(self, build: Build, number: int, bar: Bar):
        self.build, self.bar, self.numbers = build, bar, build.settings.shard_images(number)
        self.files = {kind: build.directory / name for kind, name in build.settings.shard_files(number).items()}
        self.bad_file = build.directory / build.settings.bad_file(number)
        self._left_out: dict[int, str] = {}  # image number → its line in the file of bad ones

    def batches(self) -> Iterator[Batch]:
        """Yields the shard's images, encoded, without the bad ones, which are noted and counted."""
        return self.build.images.batches(self.numbers, self.build.settings, self._skip)

    def leave_out(self, number: int, reason: str) -> None:
        """Notes that an image is left out."""
        self._left_out[number] = f"{self.build.images.source_id(number)}\t{printable(reason)}"

    def count(self, images: int) -> None:
        """Moves the progress bar on by so many images."""
        self.bar.update(images)

    def write_left_out(self) -> list[str]:
        """Lists what is left out, which is to be done before the shard's last file; returns the ids of the others."""
        if self._left_out:
            write_lines(self.bad_file, [self._left_out[number] for number in sorted(self._left_out)])
        return [self.build.images.source_id(number) for number in self.numbers if number not in self._left_out]

    def _skip(self, number: int, reason: BadImage) -> None:
        self.leave_out(number, str(reason))
        if is_bad(str(reason)):
            progress.tell(f"skipped {printable(self.build.images.source_id(number))}: {printable(reason)}")
        self.count(1)


def in_turn(
    counts: dict[Item, int], missing: Sequence[Item], label: str, workers: Workers
) -> Iterator[tuple[Item, Bar]]:
    """Yields the missing shards, with the progress bar of their images; a signal stops the process between two.

    Args:
      counts: images of each shard of this process, of those that are there too.
      missing: those to be written.
      label: what the bar says.
    """
    total, left = sum(counts.values()), sum(counts[shard] for shard in missing)
    label += f" (process {workers.index} of {workers.count})" if workers.count > 1 else ""
    with (
        progress.bar(total=total, initial=total - left, unit="image", desc=label) as bar,
        signals.held("shard", SHARD_SECONDS) as point,
    ):
        for shard in missing:
            yield shard, bar
            point.check()
            workers.check()


def require_same_settings(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> str:
    """What lies in the directory: "nothing", "begun" or "whole".

    Raises:
      UserError: a folder or an unfinished build of other settings, or other files.
    """
    state, found = state_of(kind, directory)
    compared = [field.name for field in dataclasses.fields(settings) if field.compare]
    held, wanted = ({name: getattr(x, name) for name in compared} for x in (found or settings, settings))
    differ = differences(held, wanted)
    if differ:
        raise UserError(f"{directory} holds a {kind.noun} of other settings: {differ}; choose another --workdir")
    return state


def state_of(kind: type[ShardFolder], directory: Path) -> tuple[str, Any]:
    """What lies in the directory ("nothing", "begun" or "whole"), and its settings (None of nothing).

    Raises:
      UserError: other files lie there.
    """
    # in this order, for another process may finish the build meanwhile
    with contextlib.suppress(FileNotFoundError):
        if not (directory / MANIFEST).exists():
            return "begun", read_building(kind, directory)
    if (directory / MANIFEST).exists():
        return "whole", kind.open(directory).settings
    # a kill before building.json was renamed may leave its temporary file
    if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise UserError(f"{directory} holds other files and no {kind.noun}; choose an empty --workdir")
    return "nothing", None


def read_building(kind: type[ShardFolder], directory: Path) -> Any:
    """Settings of the unfinished build in the directory.

    Raises:
      FileNotFoundError: there is none.
      UserError: its record is damaged.
    """
    path = directory / BUILDING
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return parse(kind.settings_class, read_object(path), str(path))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # another process has finished the build meanwhile
            raise error.__cause__ from None
        raise UserError(f"{path} is damaged: {error}; choose another --workdir") from error


def missing_shards(directory: Path, settings: ShardSettings) -> list[int]:
    """The shards of which a file is not there yet."""
    there = {path.name for path in directory.iterdir()}
    return [shard for shard in range(settings.num_shards) if not there.issuperset(settings.shard_files(shard).values())]


def write_records(path: Path, records: Iterable[bytes], options: str) -> None:
    """One ArrayRecord file, whole or not at all; ``options`` as ``ArrayRecordWriter`` takes them."""
    with atomic_write(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), options)
        for record in records:
            writer.write(record)
        writer.close()


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A text file of these lines, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _manifest(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> dict[str, Any]:
    """What the manifest says, after hashing every file."""
    counts = {name: {"images": 0} for name in settings.other_files}
    for shard in range(settings.num_shards):
        counts |= settings.shard_counts(directory, shard)
    files = {name: facts_of(directory / name, count) for name, count in counts.items()}
    return {"format_version": kind.format_version, "settings": dataclasses.asdict(settings), "files": files}
