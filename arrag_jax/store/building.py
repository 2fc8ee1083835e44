"""Builds a folder of shards. A build that is interrupted at any moment and run again writes the same bytes.

``begun`` opens and finishes the build, and ``Build.write`` has the missing shards written where an engine of ``work``
does that; the functions that write one shard are in ``writer``. Each file is written atomically
(``files.atomic_write``). The process that leads writes the manifest, last. ``building.json`` holds the settings of an
unfinished build, so that a build with other settings never mixes with it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError, printable
from arrag_jax.files import atomic_write, exclusive_lock, remove_temporary, write_errors, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import differences, parse
from arrag_jax.store.encoding import Batch, EncodedImages
from arrag_jax.store.shards import MANIFEST, ShardFolder, ShardSettings, facts_of, write_manifest
from arrag_jax.store.skipped import SkipLimit, is_bad
from arrag_jax.work import HERE, Engine, Opened, Report, run_work

BUILDING = "building.json"


@contextlib.contextmanager
def begun(
    kind: type[ShardFolder],
    directory: Path,
    images: EncodedImages | Opened[EncodedImages],
    settings: ShardSettings,
    limit: SkipLimit,
    engine: Engine = HERE,
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
      engine: where the shards are written; all its machines need access to the directory.

    Raises:
      UserError: if there are too few images or too many bad ones, the directory holds another folder or build (which
        stays untouched), the disk is full, or another process of the run has ended.
    """
    images = images if isinstance(images, Opened) else Opened(None, images)
    if require_same_settings(kind, directory, settings) != "whole":
        images().require(settings)
    if not engine.leads:
        engine.meet(f"start of {directory}")
        is_whole = require_same_settings(kind, directory, settings) == "whole"
        yield Build(directory, images, settings, limit, engine, is_whole)
        engine.meet(f"manifest of {directory}")
        return
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        is_whole = require_same_settings(kind, directory, settings) == "whole"
        if not is_whole and (directory / BUILDING).exists():
            settings = read_building(kind, directory)  # keeps the record fields of the run that started it
        elif not is_whole:
            write_json(directory / BUILDING, dataclasses.asdict(settings))
        build = Build(directory, images, settings, limit, engine, is_whole)
        engine.meet(f"start of {directory}")
        yield build
        if not is_whole:
            build.require_few_bad()
            if lost := missing_shards(directory, settings):
                raise UserError(
                    f"shards of {directory} are not to be seen here, the first is {lost[0]}; --workdir must be on a "
                    "disk that all machines share"
                )
            write_manifest(directory, manifest_of(kind, directory, settings))
            remove_temporary(directory)
        (directory / BUILDING).unlink(missing_ok=True)
    engine.meet(f"manifest of {directory}")


@dataclasses.dataclass(frozen=True)
class Build:
    """A build of one folder; see ``begun``."""

    directory: Path
    images: Opened[EncodedImages]
    settings: ShardSettings
    limit: SkipLimit
    engine: Engine
    is_whole: bool

    @property
    def leads(self) -> bool:
        """Whether this process must write the files that belong to no shard (the folder is not complete yet)."""
        return self.engine.leads and not self.is_whole

    def write(self, write: Callable[["Shard"], None]) -> None:
        """Has each missing shard written by ``write``, which must be picklable where the engine sends it."""
        if self.is_whole:
            return
        sizes = {number: len(self.settings.shard_images(number)) for number in range(self.settings.num_shards)}
        missing = missing_shards(self.directory, self.settings)
        make = functools.partial(_ShardWriter, self.directory, self.settings, self.images, write)
        for _ in run_work(missing, make, sizes, str(self.directory), engine=self.engine):
            self.require_few_bad()

    def require_few_bad(self) -> None:
        """Raises UserError if more images are bad than the limit allows."""
        self.limit.require_few(self.directory, self.settings.num_images)


@dataclasses.dataclass(frozen=True)
class _ShardWriter:
    """Writes shards by their numbers; a worker of ``work``."""

    directory: Path
    settings: ShardSettings
    images: Opened[EncodedImages]
    write: Callable[["Shard"], None]

    def __call__(self, number: int, report: Report) -> None:
        shard = Shard(self.directory, self.settings, self.images(), number, report)
        # A killed run may have left this file. An image that was bad then may be readable now.
        shard.bad_file.unlink(missing_ok=True)
        self.write(shard)


class Shard:
    """A shard that is being written.

    Attributes:
      settings: the settings of its folder.
      files: kind of content → path of its file.
      bad_file: path of the file that lists the images left out; it exists only if there are any.
    """

    def __init__(self, directory: Path, settings: ShardSettings, images: EncodedImages, number: int, report: Report):
        self.settings, self.images, self.report = settings, images, report
        self.numbers = settings.shard_images(number)
        self.files = {kind: directory / name for kind, name in settings.shard_files(number).items()}
        self.bad_file = directory / settings.bad_file(number)
        self._left_out: dict[int, str] = {}  # image number → its line in ``bad_file``

    def batches(self) -> Iterator[Batch]:
        """Yields batches of the shard's encoded images; bad images are left out and recorded."""
        return self.images.batches(self.numbers, self.settings, self._skip)

    def leave_out(self, number: int, reason: str) -> None:
        """Records that an image is left out, and why."""
        self._left_out[number] = f"{self.images.source_id(number)}\t{printable(reason)}"

    def count(self, images: int) -> None:
        """Advances the progress bar by ``images`` images."""
        self.report.count(images)

    def write_left_out(self) -> list[str]:
        """Writes ``bad_file`` if images are left out, and returns the ids of the images that are kept.

        Call it before the shard's last file is written, because that file marks the shard as done.
        """
        if self._left_out:
            write_lines(self.bad_file, [self._left_out[number] for number in sorted(self._left_out)])
        return [self.images.source_id(number) for number in self.numbers if number not in self._left_out]

    def _skip(self, number: int, reason: BadImage) -> None:
        self.leave_out(number, str(reason))
        if is_bad(str(reason)):
            self.report.tell(f"skipped {printable(self.images.source_id(number))}: {printable(reason)}")
        self.count(1)


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


def manifest_of(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> dict[str, Any]:
    """Returns the content of the manifest; reads and hashes every file."""
    counts = {name: {"images": 0} for name in settings.other_files}
    for shard in range(settings.num_shards):
        counts |= settings.shard_counts(directory, shard)
    files = {name: facts_of(directory / name, count) for name, count in counts.items()}
    return {"format_version": kind.format_version, "settings": dataclasses.asdict(settings), "files": files}
