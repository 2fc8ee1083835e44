"""Builds a folder of shards. A build that is interrupted at any moment and run again writes the same bytes.

``begun`` opens and finishes the build. ``Build.pending`` yields the shards that still have to be written; the loops
over them are in ``writer``. Each file is written atomically (``files.atomic_write``), and the manifest is written last.
``building.json`` holds the settings of an unfinished build, so that a build with other settings never mixes with it.
Several processes can share the shards.
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
SHARD_SECONDS = 60.0  # time limit to finish the current shard after a signal; batch systems wait twice as long
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
    """Yields the build of a folder in ``directory``; the folder is complete when the context exits.

    Starts the build, or resumes an unfinished one. If the folder is already complete, the build has nothing to do.

    Args:
      kind: the kind of folder.
      directory: where the folder is built; created if absent.
      images: at least ``settings.num_images`` images, of which the first ones are used; not read if the folder is
        complete.
      settings: what to build.
      limit: how many images may be bad.
      workers: the processes that build the folder together, all on the same file system; None = this process alone.

    Raises:
      UserError: if there are too few images or too many bad ones, the directory holds another folder or build (which
        stays untouched), the disk is full, or another one of the processes has ended.
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
            settings = read_building(kind, directory)  # keeps the record fields of the run that started it
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
    """A build of one folder; see ``begun``."""

    directory: Path
    images: EncodedImages
    settings: ShardSettings
    limit: SkipLimit
    workers: Workers
    is_whole: bool

    @property
    def leads(self) -> bool:
        """Whether this process must write the files that belong to no shard (the folder is not complete yet)."""
        return self.workers.leads and not self.is_whole

    def pending(self) -> Iterator["Shard"]:
        """Yields each unfinished shard of this process; the caller writes it before it takes the next one."""
        if self.is_whole:
            return
        own = self.workers.share(range(self.settings.num_shards))
        missing = sorted(set(own) & set(missing_shards(self.directory, self.settings)))
        counts = {number: len(self.settings.shard_images(number)) for number in own}
        for number, bar in in_turn(counts, missing, str(self.directory), self.workers):
            shard = Shard(self, number, bar)
            # A killed run may have left this file. An image that was bad then may be readable now.
            shard.bad_file.unlink(missing_ok=True)
            yield shard
            self.require_few_bad()

    def require_few_bad(self) -> None:
        """Raises UserError if more images are bad than the limit allows."""
        self.limit.require_few(self.directory, self.settings.num_images)


class Shard:
    """A shard that is being written.

    Attributes:
      files: kind of content → path of its file.
      bad_file: path of the file that lists the images left out; it exists only if there are any.
    """

    def __init__(self, build: Build, number: int, bar: Bar):
        self.build, self.bar, self.numbers = build, bar, build.settings.shard_images(number)
        self.files = {kind: build.directory / name for kind, name in build.settings.shard_files(number).items()}
        self.bad_file = build.directory / build.settings.bad_file(number)
        self._left_out: dict[int, str] = {}  # image number → its line in ``bad_file``

    def batches(self) -> Iterator[Batch]:
        """Yields batches of the shard's encoded images; bad images are left out and recorded."""
        return self.build.images.batches(self.numbers, self.build.settings, self._skip)

    def leave_out(self, number: int, reason: str) -> None:
        """Records that an image is left out, and why."""
        self._left_out[number] = f"{self.build.images.source_id(number)}\t{printable(reason)}"

    def count(self, images: int) -> None:
        """Advances the progress bar by ``images`` images."""
        self.bar.update(images)

    def write_left_out(self) -> list[str]:
        """Writes ``bad_file`` if images are left out, and returns the ids of the images that are kept.

        Call it before the shard's last file is written, because that file marks the shard as done.
        """
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
    """Yields each missing shard with the progress bar of images; a signal stops the process between two shards.

    Args:
      counts: number of images of each shard of this process, including the finished shards.
      missing: the shards that have to be written.
      label: the text of the progress bar.
      workers: the processes that share the shards.
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
    """Returns the state of the directory: "nothing", "begun" (an unfinished build) or "whole" (a complete folder).

    Raises:
      UserError: if the directory holds a folder or an unfinished build with other settings, or other files.
    """
    state, found = state_of(kind, directory)
    compared = [field.name for field in dataclasses.fields(settings) if field.compare]
    held, wanted = ({name: getattr(x, name) for name in compared} for x in (found or settings, settings))
    differ = differences(held, wanted)
    if differ:
        raise UserError(f"{directory} holds a {kind.noun} of other settings: {differ}; choose another --workdir")
    return state


def state_of(kind: type[ShardFolder], directory: Path) -> tuple[str, Any]:
    """Returns the state of the directory ("nothing", "begun" or "whole") and its settings (None for "nothing").

    Raises:
      UserError: if the directory holds other files.
    """
    # The unfinished build is checked first, because another process may finish it during the checks.
    with contextlib.suppress(FileNotFoundError):
        if not (directory / MANIFEST).exists():
            return "begun", read_building(kind, directory)
    if (directory / MANIFEST).exists():
        return "whole", kind.open(directory).settings
    # Hidden files do not count: a process killed while it wrote building.json leaves a temporary file.
    if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise UserError(f"{directory} holds other files and no {kind.noun}; choose an empty --workdir")
    return "nothing", None


def read_building(kind: type[ShardFolder], directory: Path) -> Any:
    """Returns the settings of the unfinished build in the directory.

    Raises:
      FileNotFoundError: if there is no unfinished build.
      UserError: if ``building.json`` is damaged.
    """
    path = directory / BUILDING
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        return parse(kind.settings_class, read_object(path), str(path))
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # another process has just finished the build
            raise error.__cause__ from None
        raise UserError(f"{path} is damaged: {error}; choose another --workdir") from error


def missing_shards(directory: Path, settings: ShardSettings) -> list[int]:
    """Returns the numbers of the shards that lack at least one file."""
    there = {path.name for path in directory.iterdir()}
    return [shard for shard in range(settings.num_shards) if not there.issuperset(settings.shard_files(shard).values())]


def write_records(path: Path, records: Iterable[bytes], options: str) -> None:
    """Writes one ArrayRecord file atomically; ``options`` is passed to ``ArrayRecordWriter``."""
    with atomic_write(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), options)
        for record in records:
            writer.write(record)
        writer.close()


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a UTF-8 text file of these lines atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _manifest(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> dict[str, Any]:
    """Returns the content of the manifest; reads and hashes every file."""
    counts = {name: {"images": 0} for name in settings.other_files}
    for shard in range(settings.num_shards):
        counts |= settings.shard_counts(directory, shard)
    files = {name: facts_of(directory / name, count) for name, count in counts.items()}
    return {"format_version": kind.format_version, "settings": dataclasses.asdict(settings), "files": files}
