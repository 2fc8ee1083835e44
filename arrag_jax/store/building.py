"""Builds a folder of shards: stop it at any moment, run it again, and the bytes are the same.

A shard's files appear whole (``files.atomic_write``), the manifest last. ``building.json`` holds the settings of an
unfinished build, so that one with other settings never mixes with it. Several processes take the shards in turn.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from arrag_jax import progress, signals
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, exclusive_lock, write_errors, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import parse, shown
from arrag_jax.progress import Bar
from arrag_jax.store.shards import MANIFEST, ShardFolder, ShardSettings, facts_of, write_manifest
from arrag_jax.store.workers import Workers

BUILDING = "building.json"
SHARD_SECONDS = 60.0  # most that a shard is given to be finished in after a signal; batch systems wait twice as long


def build(
    kind: type[ShardFolder],
    directory: str | Path,
    settings: ShardSettings,
    write_shard: Callable[[int, Bar], None],
    begin: Callable[[], None] = lambda: None,
    finish: Callable[[], None] = lambda: None,
    workers: Workers | None = None,
) -> ShardFolder:
    """Builds a folder in ``directory``, or goes on with it, or finds it whole.

    Args:
      kind: of folder.
      directory: made if absent.
      settings: what to build.
      write_shard: writes the files of one shard and counts its images on the bar as it goes.
      begin: called once before the shards; writes ``settings.other_files``.
      finish: called once when all shards are there; may raise to keep the folder unfinished.
      workers: the processes that build it together, all on the same file system; None = this one alone.

    Raises:
      UserError: another folder or build in the directory (nothing is touched), a disk that is full, or the end of
        another process of the team.
    """
    directory, workers = Path(directory), workers or Workers(Path(directory), 0, 1)
    if not workers.leads:
        workers.wait_until(lambda: require_same_settings(kind, directory, settings) != "nothing")
        if not (directory / MANIFEST).exists():
            _write_shards(directory, settings, write_shard, workers)
            workers.wait_until((directory / MANIFEST).exists)
        return kind.open(directory)
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        if require_same_settings(kind, directory, settings) != "whole":
            if (directory / BUILDING).exists():
                settings = read_building(kind, directory)  # the records of the run that began it
            else:
                write_json(directory / BUILDING, dataclasses.asdict(settings))
            begin()
            _write_shards(directory, settings, write_shard, workers)
            workers.wait_until(lambda: not missing_shards(directory, settings))
            finish()
            write_manifest(directory, _manifest(kind, directory, settings))
        (directory / BUILDING).unlink(missing_ok=True)
    return kind.open(directory)


def require_same_settings(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> str:
    """What lies in the directory: "nothing", "begun" or "whole".

    Raises:
      UserError: a folder or an unfinished build of other settings, or other files.
    """
    state, found = state_of(kind, directory)
    fields = [field.name for field in dataclasses.fields(settings) if field.compare]
    differ = [
        f"{x}: {shown(getattr(found, x))}, not {shown(getattr(settings, x))}"
        for x in fields
        if found and getattr(found, x) != getattr(settings, x)
    ]
    if differ:
        raise UserError(
            f"{directory} holds a {kind.noun} of other settings ({'; '.join(differ)}); choose another --workdir"
        )
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


def _write_shards(
    directory: Path, settings: ShardSettings, write_shard: Callable[[int, Bar], None], workers: Workers
) -> None:
    """Writes every shard of this process that is not there yet."""
    own = workers.share(range(settings.num_shards))
    missing = sorted(set(own) & set(missing_shards(directory, settings)))
    total, left = (sum(len(settings.shard_images(shard)) for shard in shards) for shards in (own, missing))
    label = str(directory) + (f" (process {workers.index} of {workers.count})" if workers.count > 1 else "")
    with (
        progress.bar(total=total, initial=total - left, unit="image", desc=label) as bar,
        signals.held("shard", SHARD_SECONDS) as point,
    ):
        for shard in missing:
            write_shard(shard, bar)
            point.check()
            workers.check()


def _manifest(kind: type[ShardFolder], directory: Path, settings: ShardSettings) -> dict[str, Any]:
    """What the manifest says, after hashing every file."""
    counts = {name: {"images": 0} for name in settings.other_files}
    for shard in range(settings.num_shards):
        counts |= settings.shard_counts(directory, shard)
    files = {name: facts_of(directory / name, count) for name, count in counts.items()}
    return {"format_version": kind.format_version, "settings": dataclasses.asdict(settings), "files": files}
