"""Stores of several segments: adds images to a complete store, and merges stores.

A segment is a store of its own in a folder ``part-00001`` of the first one, whose manifest names the segment and its
fingerprint. Complete files are never rewritten, except this manifest, which is replaced atomically.

A merge takes each image once, from the first store that holds it (``identity``); duplicates within one store stay. A
segment that shares images with an earlier store is rewritten without them. The other segments are copied byte by byte.
Hidden keys of a backbone that every segment has with the same projection are carried over.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from arrag_jax import progress
from arrag_jax.data.examples import DUPLICATE
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, exclusive_lock, folder_in, require_within, write_json
from arrag_jax.json_files import read_object
from arrag_jax.ops.keys import KINDS_BY_FILE
from arrag_jax.store import rights
from arrag_jax.store.building import state_of, write_lines
from arrag_jax.store.datastore import SAME_IN_ALL_SEGMENTS, Datastore, StoreSettings
from arrag_jax.store.hidden import HiddenFolder, backbones_in, folder_of
from arrag_jax.store.hidden_building import copy_hidden
from arrag_jax.store.identity import KnownContents, digests_of
from arrag_jax.store.shards import MANIFEST, content_of, facts_of, write_manifest
from arrag_jax.store.skipped import counts_of, read_bad
from arrag_jax.store.writer import write_file

MERGING = ".merging.json"  # in the folder of an unfinished merge: the fingerprints of the merged stores
CUT = ""  # in place of the name of an image's duplicate: the image is not wanted
_OF_WHOLE = (
    "parts",
    "sha256",
    "merged",
    "keep_duplicates",
    "wanted",
    "duplicates",
)  # manifest fields that a merge does not copy


def next_segment(store: Datastore) -> Path:
    """Returns the folder of the store's next segment; it may already hold a build that is not added yet."""
    return require_within(store.directory, store.directory / _segment_name(len(store.segments) + 1))


def require_fits(store: Datastore, settings: StoreSettings, other: Datastore | None = None) -> None:
    """Raises UserError unless images with these settings can be a segment of the store.

    Args:
      store: the store that receives the segment.
      settings: the settings of the segment.
      other: the store that has these settings, if it exists already.
    """
    for name in SAME_IN_ALL_SEGMENTS:
        ours, theirs = getattr(store.settings, name), getattr(settings, name)
        if ours != theirs and not (name == "keys" and set(ours) == set(theirs)):
            mend = _mend(name, (store, ours), (other, theirs))
            raise UserError(
                f"datastore {store.directory} has {name}={ours!r}, the images to add have {theirs!r}; build a store of "
                f"their own{mend}"
            )


def _mend(name: str, *both: tuple[Datastore | None, Any]) -> str:
    """Returns the end of the error message: the commands that make the two fit, or "" if no command can."""
    if name == "keys":
        union = tuple(dict.fromkeys(kind for _, held in both for kind in held))
        flag, lacking = f"--config.keys={','.join(union)}", [x for x, held in both if set(held) < set(union)]
    elif name == "captions" or (name == "rights" and not both[1][1] and both[1][0] is None):
        flag, lacking = f"--config.{name}=True", [x for x, held in both if not held]
    else:
        return ""
    commands = [store.further(flag) if store else f"this command again with {flag}" for store in lacking]
    return f", or first run: {' and '.join(commands)}"


def add_segment(
    store: Datastore, segment: Path, prepare: Callable[[Datastore], contextlib.AbstractContextManager] | None = None
) -> Datastore:
    """Adds a complete segment to the store's manifest and returns the extended store.

    Args:
      store: the store that receives the segment.
      segment: the segment's folder.
      prepare: called with the extended store. On entry the context builds the store's new indexes in another place; it
        exits right after the manifest is written, and then moves the indexes into place. Until then, readers see the
        old store with the old indexes.

    Raises:
      UserError: if the segment is incomplete or does not fit, or another process writes to the store.
    """
    whole = Datastore.open(segment)
    require_fits(store, whole.settings)
    store.require_manifest()  # else a damaged manifest would get a new, valid hash
    content = content_of(store.manifest)
    content["parts"] = {**content.get("parts", {}), segment.name: whole.store_fingerprint}
    grown = dataclasses.replace(
        store, manifest=content, segments=(*store.segments, whole), num_images=store.num_images + whole.num_images
    )
    with contextlib.ExitStack() as prepared:
        if prepare is not None:
            prepared.enter_context(prepare(grown))
        with exclusive_lock(store.directory):
            if Datastore.open(store.directory).manifest != store.manifest:
                raise UserError(f"another process has changed {store.directory}; run the same command again")
            write_manifest(store.directory, content)
            prepared.close()
    return Datastore.open(store.directory)


class Wanted(NamedTuple):
    """Chooses images of a segment.

    Attributes:
      name: what is chosen; a merge continues only with the same name.
      of: takes a segment; returns which of its images are wanted.
    """

    name: str
    of: Callable[[Datastore], Bool[np.ndarray, " n"]]


class _Taken(NamedTuple):
    """What a merge takes from a segment.

    ``same`` names each image's duplicate in an earlier store; None = the image is taken, ``CUT`` = it is not wanted.
    """

    segment: Datastore
    same: list[str | None]
    reported: frozenset[tuple[str, str]]  # the images that earlier stores list as left out

    @property
    def is_whole(self) -> bool:
        return all(name is None for name in self.same) and self.reported.isdisjoint(self.segment.bad)

    @property
    def is_empty(self) -> bool:
        return all(name is not None for name in self.same) and self.reported.issuperset(self.segment.bad)


def merge(
    stores: list[Datastore], directory: str | Path, keep_duplicates: bool = False, wanted: Wanted | None = None
) -> Datastore:
    """Merges stores into one in ``directory`` and returns it; an interrupted merge continues when called again.

    Args:
      stores: the stores to merge, in order.
      directory: the folder of the merged store.
      keep_duplicates: take an image from every store that holds it, not only from the first one.
      wanted: takes only some of the images; None = all.

    Raises:
      UserError: if no image is wanted, if the stores differ in tokenizer, grid, kinds of key or captions, or if the
        directory holds other files.
    """
    directory = Path(directory)
    for store in stores:
        require_fits(stores[0], store.settings, store)
        for segment in (store, *store.segments):
            segment.require_manifest()
        if store.directory.resolve() == directory.resolve():
            raise UserError(f"--workdir={directory} is one of the stores to merge; choose another")
    merged: dict[str, Any] = {"merged": [store.store_fingerprint for store in stores]}
    if keep_duplicates:
        merged["keep_duplicates"] = True
    if wanted is not None:
        merged["wanted"] = wanted.name
    state, _ = state_of(Datastore, directory) if not (directory / MERGING).exists() else ("merging", None)
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        if state == "whole":
            _require_same_merge(directory / MANIFEST, merged)
        elif state == "begun":
            raise UserError(f"{directory} holds an unfinished datastore; finish it, or choose another --workdir")
        elif state == "merging":
            _require_same_merge(directory / MERGING, merged)
        else:
            write_json(directory / MERGING, merged)
        if state != "whole":
            taken = [_cut(each, wanted) for each in _taken(stores, keep_duplicates)]
            if all(each.is_empty for each in taken):
                raise UserError(f"no image of the stores to merge is wanted ({merged.get('wanted', 'all are empty')})")
            _carry_hidden(_copy(taken, directory, merged))
            if known := rights.carried(stores, Datastore.open(directory).sources):
                rights.write(directory, known)
        (directory / MERGING).unlink(missing_ok=True)
    return Datastore.open(directory)


def _require_same_merge(record: Path, merged: dict[str, Any]) -> None:
    found = read_object(record)
    if {name: found[name] for name in ("merged", "keep_duplicates", "wanted") if name in found} != merged:
        raise UserError(f"{record.parent} holds something other than these merged stores; choose another --workdir")


def _taken(stores: list[Datastore], keep_duplicates: bool) -> Iterator[_Taken]:
    """Yields what is taken from each segment of each store, in order."""
    names: list[str] = []
    reported: frozenset[tuple[str, str]] = frozenset()
    contents = [np.zeros(0, np.uint64)]
    for store in stores:
        known, before, first = KnownContents(np.concatenate(contents), list(names)), reported, 0
        for segment in store.wholes:
            first, shown = first + segment.num_images, None if store.shown is None else store.shown[first:]
            if keep_duplicates:
                yield _not_forgotten(_Taken(segment, [None] * segment.num_images, frozenset()), shown)
                continue
            own = digests_of(segment)
            contents.append(own)
            names += segment.sources
            reported |= frozenset(segment.bad)
            yield _not_forgotten(_Taken(segment, known.find(own), before), shown)


def _not_forgotten(taken: _Taken, shown: Bool[np.ndarray, " n"] | None) -> _Taken:
    """Returns what is taken of the images that are shown; ``shown`` begins with those of the segment."""
    if shown is None:
        return taken
    return taken._replace(same=[name if kept else CUT for name, kept in zip(taken.same, shown, strict=False)])


def _cut(taken: _Taken, wanted: Wanted | None) -> _Taken:
    """Returns what is taken of the wanted images."""
    if wanted is None:
        return taken
    pairs = zip(taken.same, wanted.of(taken.segment), strict=True)
    return taken._replace(same=[CUT if name is None and not keep else name for name, keep in pairs])


def _carry_hidden(placed: list[tuple[_Taken, Path]]) -> None:
    """Writes the hidden keys of the images taken, for each backbone whose keys all segments have."""
    for backbone in set.intersection(*({*backbones_in(each.segment.directory)} for each, _ in placed)):
        folders = [HiddenFolder.open(folder_of(each.segment.directory, backbone)) for each, _ in placed]
        if len({folder.settings.projection for folder in folders}) > 1:
            progress.tell(f"hidden keys of backbone {backbone} are left out: the stores have different projections")
            continue
        for (each, target), folder in zip(placed, folders, strict=True):
            new = np.array([number for number, name in enumerate(each.same) if name is None], np.int64)
            copy_hidden(folder, new, folder_of(target, backbone), Datastore.open(target).alone.store_fingerprint)


def _copy(taken: list[_Taken], directory: Path, merged: dict[str, Any]) -> list[tuple[_Taken, Path]]:
    """Writes every file that does not exist yet, then the manifests of the segments, then the store's own.

    Returns what was taken from each segment that is not empty, and its folder.
    """
    contents: dict[Path, dict[str, Any]] = {}
    jobs: list[tuple[Path, Callable[[Path], Any]]] = []
    rewritten: list[tuple[_Taken, Path]] = []
    for number, each in enumerate(x for x in taken if not x.is_empty):
        target = folder_in(directory, _segment_name(number)) if number else directory
        contents[target] = {key: x for key, x in each.segment.manifest.items() if key not in _OF_WHOLE}
        if not each.is_whole:
            rewritten.append((each, target))
            jobs += [(target / name, write) for name, write in _writers(each).items()]
        whole = each.segment.settings.other_files if not each.is_whole else each.segment.files
        jobs += [(target / name, _copier(each.segment.directory / name)) for name in whole]
    for target, write in progress.bar(jobs, unit="file", desc=str(directory)):
        if not target.exists():
            write(target)
    for each, target in rewritten:
        contents[target]["files"] = _facts(each, target)
    names = {}
    for target, content in list(contents.items())[1:]:
        write_manifest(target, content)
        names[target.name] = Datastore.open(target).store_fingerprint
    again = sum(x.segment.manifest.get("duplicates", 0) + len(x.same) * x.is_empty for x in taken)
    write_manifest(
        directory, {**contents[directory], "parts": names, **merged, **({"duplicates": again} if again else {})}
    )
    return list(zip((x for x in taken if not x.is_empty), contents, strict=True))


def _copier(source: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        with atomic_write(target) as temporary:
            temporary.write_bytes(source.read_bytes())

    return write


class _Shard(NamedTuple):
    """A shard of a rewritten segment: its files, its old images, the images taken, and the lines of those left out."""

    files: dict[str, str]
    images: range
    new: list[int]
    bad_file: str
    left_out: list[tuple[str, str]]
    reported: int  # number of other images left out, which an earlier store lists


def _shards(taken: _Taken) -> Iterator[_Shard]:
    segment, first = taken.segment, 0
    for shard in range(segment.settings.num_shards):
        files, bad_file = segment.settings.shard_files(shard), segment.settings.bad_file(shard)
        images = range(first, first := first + segment.files[files["codes"]]["images"])
        new = [number for number in images if taken.same[number] is None]
        bad = read_bad(segment.directory / bad_file) if bad_file in segment.files else []
        same = [(segment.sources[i], f"{DUPLICATE}{taken.same[i]}") for i in images if taken.same[i]]
        cut = sum(taken.same[i] == CUT for i in images)
        unreported = [line for line in bad if line not in taken.reported]
        reported = cut + len(bad) - len(unreported) + segment.files[files["codes"]].get("told", 0)
        yield _Shard(files, images, new, bad_file, [*unreported, *same], reported)


def _writers(taken: _Taken) -> dict[str, Callable[[Path], None]]:
    """Returns file name → function that writes the file with only the images taken, for a rewritten segment."""
    writers: dict[str, Callable[[Path], None]] = {}
    for shard in _shards(taken):
        for kind, name in shard.files.items():
            writers[name] = functools.partial(_write_new, taken.segment, kind, shard)
        if shard.left_out:
            lines = ["\t".join(line) for line in shard.left_out]
            writers[shard.bad_file] = functools.partial(write_lines, lines=lines)
    return writers


def _write_new(segment: Datastore, kind: str, shard: _Shard, target: Path) -> None:
    """Writes one file of a shard with only the images taken."""
    if kind in KINDS_BY_FILE:
        grids = segment.records_of(kind, shard.images.start, shard.images.stop)
        write_file(target, kind, [grids[number - shard.images.start].tobytes() for number in shard.new])
    else:
        lines = getattr(segment, kind)
        write_file(target, kind, [lines[number] for number in shard.new])


def _facts(taken: _Taken, target: Path) -> dict[str, dict[str, Any]]:
    """Returns the manifest's facts about the files of a rewritten segment."""
    counts = {name: {"images": 0} for name in taken.segment.settings.other_files}
    for shard in _shards(taken):
        count = {"images": len(shard.new)} | ({"told": shard.reported} if shard.reported else {})
        counts |= {name: count for name in shard.files.values()}
        if shard.left_out:
            counts[shard.bad_file] = counts_of([reason for _, reason in shard.left_out])
    return {name: facts_of(target / name, count) for name, count in counts.items()}


def _segment_name(number: int) -> str:
    return f"part-{number:05d}"
