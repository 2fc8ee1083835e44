"""ScaNN indexes on disk, in the folder of the datastore from which they are built: ``<store>/index-<kind>/``.

``index.json`` records the store (by its fingerprint), the rows and the options of the index, the size and SHA-256 of
every file, and the SHA-256 of its own content. A complete index is put in place atomically, by one rename.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_folder, clear_leftovers, is_being_written, sha256_of, sync, write_json
from arrag_jax.json_files import read_object
from arrag_jax.ops.keys import HIDDEN, KEY_KINDS
from arrag_jax.parsing import differences, in_range, parse, shown
from arrag_jax.retrieval.index_shards import write_shards
from arrag_jax.retrieval.patches import stored_patches
from arrag_jax.retrieval.scann import HostSearch, ShardSearch, import_scann, shard_bounds
from arrag_jax.retrieval.scann_rules import bytes_a_number, num_leaves
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.shards import MOST_IMAGES, content_hash
from arrag_jax.work import HERE, Engine

INDEX_VERSION = 3
RECORD = "index.json"
ASSETS = "scann_assets.pbtxt"  # ScaNN's list of a searcher's files
MOST_SHARDS = 2**16


@dataclasses.dataclass(frozen=True)
class IndexedFile:
    """An index record's facts about one file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class IndexRecord:
    """The parsed fields of ``index.json``.

    Attributes:
      entries: number of unique contexts of each shard.
      order: the order of the unique contexts; "" in older records.
      files: path below the index's folder ("shard-00000/dataset.npy") → facts about the file.
      sha256: hash of all other fields.
    """

    index_version: int
    datastore: str
    kind: str
    rows: int
    leaves: tuple[int, ...]
    bytes_a_number: tuple[int, ...]
    entries: tuple[int, ...]
    files: dict[str, IndexedFile]
    sha256: str
    order: str = ""

    def __post_init__(self):
        in_range("the number of shards in entries", len(self.entries), 1, MOST_SHARDS)
        for number in (self.rows, *self.entries):
            in_range("rows and entries", number, 1, MOST_IMAGES)
        for name in self.files:
            if not re.fullmatch(r"shard-\d{5}/[\w.-]{1,200}", name):
                raise UserError(f"files: {shown(name)} is not the name of a file inside this folder")


def index_directory(store: Datastore, kind: str) -> Path:
    """Returns the folder of the index over keys of a kind; for hidden keys it names their backbone."""
    return store.directory / (f"index-{kind}-{store.backbone}" if kind == HIDDEN.name else f"index-{kind}")


def build_index(store: Datastore, kind: str, options: ScannOptions, shards: int = 1, engine: Engine = HERE) -> Path:
    """Builds and saves the index over a store's keys, replaces an old one, and returns its directory.

    Args:
      store: a complete store, not a subset.
      kind: the kind of key, one of ``KEY_KINDS``.
      options: fixed by the build, except ``leaves_to_search``, which can be chosen again at loading.
      shards: number of searchers; a sharded search needs one per device along its mesh axis.
      engine: where they are built.

    Raises:
      UserError: if the store does not hold this kind, ScaNN cannot be imported, or the disk is full.
    """
    with new_index(store, kind, options, shards, engine):
        pass
    return index_directory(store, kind)


@contextlib.contextmanager
def new_index(
    store: Datastore, kind: str, options: ScannOptions, shards: int = 1, engine: Engine = HERE
) -> Iterator[None]:
    """Builds the index in a temporary folder; on exit it replaces the old one. Arguments as in ``build_index``."""
    with atomic_folder(index_directory(store, kind), "an index", replace=True) as temporary:
        _write_index(temporary, store, kind, options, shards, engine)
        yield


def refresh_index(store: Datastore, kind: str, options: ScannOptions, shards: int = 1, engine: Engine = HERE) -> None:
    """Builds the index unless a current one exists; then removes leftovers of a killed build.

    Arguments and errors are those of ``build_index``.
    """
    if is_current(store, kind, options, shards):
        clear_leftovers(index_directory(store, kind))
    else:
        build_index(store, kind, options, shards, engine)


def _write_index(
    directory: Path, store: Datastore, kind: str, options: ScannOptions, shards: int, engine: Engine
) -> None:
    places = [directory / _shard_name(shard) for shard in range(shards)]
    entries, files = write_shards(places, store, kind, options, engine), {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(path)
        files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record = {**_identity(store, kind, options, entries), "entries": entries, "files": files}
    write_json(directory / RECORD, {**record, "sha256": content_hash(record)})


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def is_current(store: Datastore, kind: str, options: ScannOptions, shards: int = 1) -> bool:
    """Returns whether there is an undamaged index of this store, built with these options, that ScaNN can read."""
    try:
        entries, numbers = _checked_files(store, kind, options, shards), _numbers(store, kind)
        for shard, number in enumerate(entries):
            _load_searcher(index_directory(store, kind) / _shard_name(shard), number, numbers, "")
    except UserError:
        return False
    return True


def load_index(
    store: Datastore,
    kind: str,
    k: int,
    options: ScannOptions,
    shards: int = 1,
    local: Iterable[int] | None = None,
) -> HostSearch:
    """Loads the searchers of a saved index.

    Args:
      store: the store from which the index was built.
      kind: the kind of key.
      k: neighbours per query.
      options: the options of the build.
      shards: the number of shards that the index must have.
      local: the shards that this process searches; None = all. Other shards are not read.

    Raises:
      UserError: if there is no index, it belongs to another store or other options, it is damaged, ScaNN cannot read
        it, or k is out of range.
    """
    local = list(range(shards) if local is None else local)
    entries = _checked_files(store, kind, options, shards, local)
    directory, bounds = index_directory(store, kind), shard_bounds(store.num_rows(kind), shards)
    mend, searches = _mend(store, kind, options, shards), {}
    for shard in local:
        place = directory / _shard_name(shard)
        searcher = _load_searcher(place, entries[shard], _numbers(store, kind), mend)
        patches = stored_patches(store, kind, bounds[shard])
        if len(patches.keys) != entries[shard]:
            held = f"{entries[shard]:,} entries, the store has {len(patches.keys):,}"
            raise UserError(f"index {place} holds {held}; delete {directory} and {mend}")
        searches[shard] = ShardSearch(searcher, patches, options)
    return HostSearch(searches, bounds, store.table(kind), k, index_hash(store, kind))


def index_hash(store: Datastore, kind: str) -> str:
    """Returns the SHA-256 of the names and hashes of a saved index's files.

    Indexes with equal hashes find the same neighbours.

    Raises:
      UserError: if there is no index, or its record is damaged.
    """
    mend = f"run: {store.further(*_naming(store, kind))}"
    files = _read_record(index_directory(store, kind), mend).files
    return content_hash({name: facts.sha256 for name, facts in files.items()})


def _load_searcher(directory: Path, entries: int, numbers: int, mend: str) -> Any:
    """Loads the ScaNN searcher of a shard.

    The shapes and file names in the files are checked first, because ScaNN does not check them.

    Raises:
      UserError: if the files do not hold ``entries`` keys, name files elsewhere, or cannot be loaded by ScaNN.
    """
    scann, path = import_scann(), directory
    try:
        for path in sorted(directory.glob("*.npy")):
            _require_shape(path, entries, numbers)
        path = directory / ASSETS
        if re.search(rb"[/\\']", path.read_bytes()):
            raise ValueError("it names files outside of its folder")
        path = directory
        return scann.load_searcher(str(directory))
    except Exception as error:  # numpy and ScaNN raise many types for the same cause
        reason = " ".join(str(error).split())
        raise UserError(f"index {path} cannot be read by ScaNN ({shown(reason)}); {mend}") from error


def _numbers(store: Datastore, kind: str) -> int:
    """Returns the number of numbers (E) in a key of the store."""
    return KEY_KINDS[kind].numbers(store.table(kind).shape)


def _require_shape(path: Path, entries: int, numbers: int) -> None:
    """Raises ValueError unless an array of an index has one row per unique context, or is a single key-sized row."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape not in ((entries,), (entries, numbers), (numbers,)):
        raise ValueError(f"it has shape {list(array.shape)}, not that of {entries} entries of {numbers} numbers")


def saved_shards(store: Datastore, kind: str) -> int:
    """Returns the number of shards of the saved index; 1 if there is none."""
    return max(1, len(list(index_directory(store, kind).glob("shard-*"))))


def _identity(store: Datastore, kind: str, options: ScannOptions, entries: list[int]) -> dict:
    """Returns the record fields in which an index must agree with the store and the options."""
    bounds = shard_bounds(store.num_rows(kind), len(entries))
    return {
        "index_version": INDEX_VERSION,
        "datastore": store.keys_fingerprint(kind),
        "kind": kind,
        "order": "first patch",  # order of the unique contexts; older indexes have another one
        "rows": store.num_rows(kind),
        "leaves": [num_leaves(number, options) for number in entries],
        "bytes_a_number": [
            bytes_a_number(number, end - first, options) for number, (first, end) in zip(entries, bounds, strict=True)
        ],
    }


def _checked_files(
    store: Datastore, kind: str, options: ScannOptions, shards: int, local: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Checks the saved index and returns the number of unique contexts of each shard.

    Raises:
      UserError: if the index does not fit the store and options, or a file of the ``local`` shards is damaged. The
        message names the command that repairs it.
    """
    store.require_kind(kind)
    directory, mend = index_directory(store, kind), _mend(store, kind, options, shards)
    if not directory.exists() and is_being_written(directory):
        raise UserError(f"no index over {kind} keys in {store.directory} yet: another process builds it; wait for it")
    if not directory.exists():
        raise UserError(f"no index over {kind} keys in {store.directory}; {mend}")
    saved = _read_record(directory, mend)
    if len(saved.entries) != shards:
        raise UserError(f"index {directory} has {len(saved.entries)} shards, not {shards}; {mend}")
    wanted = _identity(store, kind, options, list(saved.entries))
    held = {key: list(x) if isinstance(x := getattr(saved, key), tuple) else x for key in wanted}
    differ = differences(held, wanted)
    if differ:
        raise UserError(f"index {directory} does not fit: {differ}; {mend}")
    _require_files(directory, saved.files, mend, None if local is None else tuple(map(_shard_name, local)))
    return saved.entries


def _mend(store: Datastore, kind: str, options: ScannOptions, shards: int) -> str:
    """Returns the advice of error messages: the command that builds the index with these options."""
    usual = dataclasses.asdict(ScannOptions())
    other = {f"scann.{key}": value for key, value in dataclasses.asdict(options).items() if value != usual[key]}
    other |= {"index_shards": shards} if shards > 1 or saved_shards(store, kind) > 1 else {}
    flags = (f"--config.{key}={value}" for key, value in other.items())
    return f"run: {store.further(*_naming(store, kind), *flags)}"


def _naming(store: Datastore, kind: str) -> list[str]:
    """Returns the flags that request an index over keys of a kind."""
    keys = [f"--config.keys={','.join((*store.settings.keys, kind))}"] if kind == HIDDEN.name else []
    return [*keys, f"--config.indexes={kind}"]


def fits(store: Datastore, kind: str) -> bool:
    """Returns whether there is an index over exactly the patches of the store, with any options."""
    try:
        record = _read_record(index_directory(store, kind), "")
    except UserError:
        return False
    return (record.datastore, record.rows) == (store.keys_fingerprint(kind), store.num_rows(kind))


def _read_record(directory: Path, mend: str) -> IndexRecord:
    """Reads ``index.json``; raises UserError if it is missing, of another version, or damaged."""
    path = directory / RECORD
    if not path.exists():
        raise UserError(f"{path} is missing; {mend}")
    try:
        record = read_object(path)
    except UserError as error:
        raise UserError(f"{path} is damaged: it is not an index's record ({error}); {mend}") from error
    version = record.get("index_version")
    if version != INDEX_VERSION:
        raise UserError(f"{path} has version {shown(version)}, this code reads {INDEX_VERSION}; {mend}")
    if record.get("sha256") != content_hash(record):
        raise UserError(f"{path} is damaged: it is not what was written; {mend}")
    try:
        return parse(IndexRecord, record, str(path), ignore_unknown=True)
    except UserError as error:
        raise UserError(f"{error}; {mend}") from error


def _require_files(
    directory: Path, files: dict[str, IndexedFile], mend: str, shards: tuple[str, ...] | None = None
) -> None:
    """Raises UserError unless an index has exactly these files, undamaged (hashes are checked in ``shards`` only)."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {RECORD}
    # ScaNN would unpickle a file of document ids; indexes of this project never have one
    if found != set(files) or any(name.endswith(".pkl") for name in found):
        raise UserError(f"index {directory} has missing or foreign files: {sorted(found ^ set(files))}; {mend}")
    for name, facts in files.items():
        path = directory / name
        if (shards is None or name.startswith(shards)) and sha256_of(path) != facts.sha256:
            raise UserError(f"index file {path} is damaged; {mend}")


def verify_indexes(store: Datastore) -> None:
    """Raises UserError if a file of a store's saved indexes is damaged; the message names the first one."""
    for directory in sorted(store.directory.glob("index-*")):
        mend = f"delete {directory} and build it again"
        _require_files(directory, _read_record(directory, mend).files, mend)
