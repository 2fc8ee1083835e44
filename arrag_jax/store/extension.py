"""Extends a complete store with what it was built without: latents for another kind of key, or captions.

The source's images are encoded again, in the same batches as in the build. Their codes must equal the stored codes,
because this proves that the new data belongs to the same images. The new files of each shard are then written
atomically. They become visible when the manifests name them: the manifests of the segments are written first, the
store's own manifest last. If the process is killed, the same call continues with the next shard; until the end, readers
see the store as it was. Codes, indexes and the store's fingerprint do not change.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16

from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from arrag_jax.files import exclusive_lock, remove_temporary
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.shards import content_of, facts_of, write_manifest
from arrag_jax.store.skipped import read_lines
from arrag_jax.store.writer import items_of, write_file
from arrag_jax.work import HERE, Engine, Opened, Report, run_work

# (settings of a segment, whether captions are needed) → (images of its source, image id → image number)
Reader = Callable[[StoreSettings, bool], tuple[EncodedImages, Mapping[str, int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One shard of one segment to extend; ``wanted`` are the segment's settings after the extension."""

    segment: Datastore
    wanted: StoreSettings
    shard: int

    @property
    def files(self) -> dict[str, str]:
        """The shard's new files: kind of content → file name."""
        held = self.segment.settings.shard_files(self.shard)
        return {kind: name for kind, name in self.wanted.shard_files(self.shard).items() if kind not in held}

    @property
    def absent(self) -> dict[str, str]:
        """The new files that do not exist yet: kind of content → file name."""
        return {kind: name for kind, name in self.files.items() if not (self.segment.directory / name).is_file()}

    @property
    def ids(self) -> list[str]:
        """The ids of the shard's images."""
        return read_lines(self.segment.directory / self.segment.settings.shard_files(self.shard)["sources"])

    @property
    def stored_codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of the shard's images."""
        names = [self.segment.settings.shard_files(shard)["codes"] for shard in range(self.shard + 1)]
        counts = [self.segment.files[name]["images"] for name in names]
        return self.segment.codes_of(sum(counts[:-1]), sum(counts))


def all_keys(held: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the union of the kinds of key.

    The order is ``held`` if it has the same kinds, ``wanted`` if that has all kinds of ``held``, else ``held`` followed
    by the new kinds.
    """
    if set(wanted) == set(held):
        return held
    return wanted if set(held) <= set(wanted) else (*held, *(kind for kind in wanted if kind not in held))


def extend(
    store: Datastore, keys: tuple[str, ...], captions: bool, read: Opened[Reader], engine: Engine = HERE
) -> Datastore:
    """Adds the missing keys and captions to a store and its segments, and returns the extended store.

    If an earlier call was interrupted, this call resumes it.

    Args:
      store: a complete store.
      keys, captions: what the store holds afterwards, in addition to what it holds already.
      read: opens the images of a segment's source. The tokenizer that made the store must encode them. With the batch
        size of the build, the bytes equal those of a store that was built with everything at once.
      engine: where the shards are extended.

    Raises:
      UserError: if an image is gone or has other codes now, another process writes to the store, or the disk is full.
    """
    with exclusive_lock(store.directory) if engine.leads else contextlib.nullcontext():
        jobs = _jobs(store, keys, captions)
        engine.meet(f"start of adding to {store.directory}")
        sizes = {number: len(job.ids) for number, job in enumerate(jobs)}
        left = [number for number, job in enumerate(jobs) if job.absent]
        make = functools.partial(_ShardExtender, store.directory, keys, captions, read)
        for _ in run_work(left, make, sizes, f"adding to {store.directory}", engine=engine):
            pass
        if engine.leads:
            _write_manifests(store, jobs)
            for segment in store.wholes:
                remove_temporary(segment.directory)
    engine.meet(f"manifests of {store.directory}")
    return Datastore.open(store.directory)


class _ShardExtender:
    """Extends shards by the numbers of their jobs; a worker of ``work``."""

    def __init__(self, directory: Path, keys: tuple[str, ...], captions: bool, read: Opened[Reader]):
        self._jobs, self._read = _jobs(Datastore.open(directory), keys, captions), read
        self._opened: Datastore | None = None
        self._source: tuple[EncodedImages, Mapping[str, int]]

    def __call__(self, number: int, report: Report) -> None:
        job = self._jobs[number]
        if self._opened is not job.segment:  # only one source is open at a time: the list of a folder may be long
            self._source = self._read()(job.segment.settings, "captions" in job.files)
            self._opened = job.segment
        _write_shard(job, *self._source, report)


def _jobs(store: Datastore, keys: tuple[str, ...], captions: bool) -> list[_Job]:
    """Returns the jobs of all shards: those of the segments first, those of the store's own shards last."""
    jobs = []
    for segment in (*store.segments, store.alone):
        kept = segment.settings
        wanted = dataclasses.replace(kept, keys=all_keys(kept.keys, keys), captions=captions or kept.captions)
        jobs += [_Job(segment, wanted, shard) for shard in range(wanted.num_shards)]
    return jobs


def _write_shard(job: _Job, images: EncodedImages, numbers: Mapping[str, int], report: Report) -> None:
    """Writes the new files of one shard after checking that its images still have the stored codes."""
    ids, place = job.ids, f"{job.segment.directory} (source {job.segment.settings.source})"
    gone = [id_ for id_ in ids if id_ not in numbers]
    if gone:
        raise UserError(
            f"{len(gone):,} images of {place} are no longer there ({'; '.join(gone[:3])}); put them back, or build "
            "another datastore with all keys at once in another --workdir"
        )

    def lost(number: int, reason: BadImage) -> None:
        raise UserError(
            f"{images.source_id(number)} of {place} can no longer be read: {reason}; put it back and run this again"
        )

    contents: dict[str, list[Any]] = {kind: [] for kind in job.absent}
    done, stored = 0, job.stored_codes
    for batch in images.batches([numbers[id_] for id_ in ids], job.wanted, lost):
        differ = (batch.codes != stored[done : done + len(batch.codes)]).any((1, 2))
        if differ.any():
            raise UserError(
                f"{ids[done + int(differ.argmax())]} has other codes than {place} holds: the image, or the machine "
                f"or batch size ({images.batch_size}) that encodes it, is another; build another datastore in another "
                "--workdir"
            )
        for kind, items in contents.items():
            items += items_of(kind, batch)
        done += len(differ)
        report.count(len(differ))
    for kind, items in contents.items():
        write_file(job.segment.directory / job.files[kind], kind, items)


def _write_manifests(store: Datastore, jobs: list[_Job]) -> None:
    """Writes the segments' manifests, then the store's own; old files keep their hashes, new files are hashed."""
    names = {segment.directory.name: segment.store_fingerprint for segment in store.segments}
    if names != store.manifest.get("parts", {}):  # older stores identify segments by the hash of their manifests
        write_manifest(store.directory, {**content_of(store.manifest), "parts": names})
    by_part: dict[Path, list[_Job]] = {}
    for job in jobs:
        by_part.setdefault(job.segment.directory, []).append(job)
    for directory, own in by_part.items():
        segment, wanted = own[0].segment, own[0].wanted
        if wanted == segment.settings:
            continue
        counts = {name: {"images": 0} for name in wanted.other_files}
        for job in own:
            counts |= wanted.shard_counts(directory, job.shard)
        files = {name: segment.files.get(name) or facts_of(directory / name, count) for name, count in counts.items()}
        content = {**content_of(segment.manifest), "settings": dataclasses.asdict(wanted), "files": files}
        write_manifest(directory, content | ({"parts": names} if names and directory == store.directory else {}))
