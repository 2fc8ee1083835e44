"""ScaNN indexes on disk, beside the datastore they were built from: ``<store>/index-<kind>/``.

``index.json`` tells from which store (by its fingerprint), over which rows and with which options an index was built,
the size and SHA-256 of every file, and the SHA-256 of all that it says itself. A whole index appears by one rename.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.files import explained, sha256_of, sync, write_json
from arrag_jax.retrieval.datastore import Datastore
from arrag_jax.retrieval.patches import stored_patches
from arrag_jax.retrieval.scann import (
    HostSearch,
    ShardSearch,
    build_searcher,
    bytes_a_number,
    import_scann,
    num_leaves,
    shard_bounds,
)
from arrag_jax.retrieval.shards import content_hash

INDEX_VERSION = 3
RECORD = "index.json"


def index_directory(store: Datastore, kind: str) -> Path:
    """Where the index over keys of a kind lies."""
    return store.directory / f"index-{kind}"


def build_index(store: Datastore, kind: str, options: ScannOptions, shards: int = 1) -> Path:
    """Builds and saves the index over a store's keys, replacing another one; returns its directory.

    Args:
      store: whole, not a subset.
      kind: "codebook" or "latent".
      options: all but ``leaves_to_search`` are built in; that can be chosen again at loading.
      shards: searchers; a sharded search needs one a device along its mesh axis.

    Raises:
      UserError: the kind is not in the store, ScaNN can't be imported, or the disk is full.
    """
    final = index_directory(store, kind)
    temporary, old = _leftovers(final)
    try:
        with explained(final):
            _write_index(temporary, store, kind, options, shards)
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            sync(final.parent)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
    return final


def refresh_index(store: Datastore, kind: str, options: ScannOptions, shards: int = 1) -> None:
    """Builds the index where no current one is there, and removes what a killed build left; as ``build_index``."""
    _leftovers(index_directory(store, kind))
    if not is_current(store, kind, options, shards):
        build_index(store, kind, options, shards)


def _leftovers(final: Path) -> list[Path]:
    """Where an index stands while it is built, and the one it replaces while they change places; removed first."""
    found = [final.with_name(f".{final.name}.{state}") for state in ("tmp", "old")]
    for left in found:
        shutil.rmtree(left, ignore_errors=True)
    return found


def _write_index(directory: Path, store: Datastore, kind: str, options: ScannOptions, shards: int) -> None:
    bounds, entries = shard_bounds(store.num_patches, shards), []
    # one shard's float32 keys at a time: what bounds the memory of a build
    for shard, rows in enumerate(tqdm(bounds, unit="shard", desc=f"indexing {kind} keys", dynamic_ncols=True)):
        place, patches = directory / _shard_name(shard), stored_patches(store, kind, rows)
        place.mkdir(parents=True)
        # without relative paths a moved index does not load
        build_searcher(patches, options).serialize(str(place), relative_path=True)
        entries.append(len(patches.keys))
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(path)
        files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record = {**_identity(store, kind, options, entries), "entries": entries, "files": files}
    write_json(directory / RECORD, {**record, "sha256": content_hash(record)})


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def is_current(store: Datastore, kind: str, options: ScannOptions, shards: int = 1) -> bool:
    """Is there an undamaged index of this store, built with these options?"""
    try:
        _checked_files(store, kind, options, shards)
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
      local: the shards that this process searches; None = all. No other one is read.

    Raises:
      UserError: no index here, or one of another store, of other options, or damaged; k out of range.
    """
    local = list(range(shards) if local is None else local)
    _checked_files(store, kind, options, shards, local)
    scann = import_scann()
    directory, bounds = index_directory(store, kind), shard_bounds(store.num_patches, shards)
    searches = {}
    for shard in local:
        searcher = scann.load_searcher(str(directory / _shard_name(shard)))
        searches[shard] = ShardSearch(searcher, stored_patches(store, kind, bounds[shard]), options)
    return HostSearch(searches, bounds, store.codebook, k, index_hash(store, kind))


def index_hash(store: Datastore, kind: str) -> str:
    """SHA-256 over the names and hashes of a saved index's files: equal ones find the same neighbours.

    Raises:
      UserError: no index here, or its record is damaged.
    """
    mend = f"run: python -m arrag_jax.build_datastore --config=… --workdir={store.directory}"
    files = _read_record(index_directory(store, kind), mend)["files"]
    return content_hash({name: facts["sha256"] for name, facts in files.items()})


def saved_shards(store: Datastore, kind: str) -> int:
    """Shards of the index that is there; 1 where there is none."""
    return max(1, len(list(index_directory(store, kind).glob("shard-*"))))


def _identity(store: Datastore, kind: str, options: ScannOptions, entries: list[int]) -> dict:
    """What an index must agree in with the store and options it is used with."""
    bounds = shard_bounds(store.num_patches, len(entries))
    return {
        "index_version": INDEX_VERSION,
        "datastore": store.fingerprint,
        "kind": kind,
        "order": "first patch",  # of entries; older indexes have another one
        "rows": store.num_patches,
        "leaves": [num_leaves(number, options) for number in entries],
        "bytes_a_number": [
            bytes_a_number(number, end - first, options) for number, (first, end) in zip(entries, bounds, strict=True)
        ],
    }


def _checked_files(
    store: Datastore, kind: str, options: ScannOptions, shards: int, local: Iterable[int] | None = None
) -> None:
    """Raises UserError, with the mend, unless the saved index is the wanted one and (in ``local`` shards) undamaged."""
    directory = index_directory(store, kind)
    command = "run: python -m arrag_jax.build_datastore --config=…"
    mend = f"{command} --workdir={store.directory}"
    if not directory.exists():
        raise UserError(f"no index over {kind} keys in {store.directory}; {mend}")
    saved = _read_record(directory, mend)
    entries = saved["entries"]
    if len(entries) != shards:
        raise UserError(
            f"index {directory} has {len(entries)} shards, not {shards}; {command} --config.index_shards={shards} "
            f"--workdir={store.directory}"
        )
    wanted = _identity(store, kind, options, entries)
    differ = [f"{key} {saved.get(key)!r}, not {wanted[key]!r}" for key in wanted if saved.get(key) != wanted[key]]
    if differ:
        raise UserError(f"index {directory} does not fit: it has {'; '.join(differ)}; {mend}")
    _require_files(directory, saved["files"], mend, None if local is None else tuple(map(_shard_name, local)))


def _read_record(directory: Path, mend: str) -> dict[str, Any]:
    """What ``index.json`` says; a UserError if it is missing, of another version, or not what was written."""
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, digest = record.get("index_version"), record.get("sha256")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it is not an index's record ({error}); {mend}") from error
    if version != INDEX_VERSION:
        raise UserError(f"{path} has version {version}, this code reads {INDEX_VERSION}; {mend}")
    if digest != content_hash(record):
        raise UserError(f"{path} is damaged: it is not what was written; {mend}")
    return record


def _require_files(directory: Path, files: dict[str, Any], mend: str, shards: tuple[str, ...] | None = None) -> None:
    """Raises UserError unless an index has just these files and (in shards of these names) with their content."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {RECORD}
    # ScaNN would unpickle a file of document ids; ours never have one
    if found != set(files) or any(name.endswith(".pkl") for name in found):
        raise UserError(f"index {directory} has missing or foreign files: {sorted(found ^ set(files))}; {mend}")
    for name, facts in files.items():
        path = directory / name
        if (shards is None or name.startswith(shards)) and sha256_of(path) != facts["sha256"]:
            raise UserError(f"index file {path} is damaged; {mend}")


def verify_indexes(store: Datastore) -> None:
    """Raises UserError naming the first file of any of a store's saved indexes that is not what was written."""
    for directory in sorted(store.directory.glob("index-*")):
        mend = f"delete {directory} and build it again"
        _require_files(directory, _read_record(directory, mend)["files"], mend)
