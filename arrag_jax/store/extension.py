"""Extends a complete store with what it was built without: latents for another kind of key, or captions.

The source's images are encoded again, in the same batches as in the build. Their codes must equal the stored codes,
because this proves that the new data belongs to the same images. The new files of each shard are then written
atomically. They become visible when the manifests name them: the manifests of the segments are written first, the
store's own manifest last. If the process is killed, the same call continues with the next shard; until the end, readers
see the store as it was. Codes, indexes and the store's fingerprint do not change.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16

from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from arrag_jax.files import exclusive_lock
from arrag_jax.progress import Bar
from arrag_jax.store.building import in_turn
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.shards import content_of, facts_of, write_manifest
from arrag_jax.store.skipped import read_lines
from arrag_jax.store.workers import Workers
from arrag_jax.store.writer import items_of, write_file

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
    store: Datastore, keys: tuple[str, ...], captions: bool, read: Reader, workers: Workers | None = None
) -> Datastore:
    """Adds the missing keys and captions to a store and its segments, and returns the extended store.

    If an earlier call was interrupted, this call resumes it.

    Args:
      store: a complete store.
      keys, captions: what the store holds afterwards, in addition to what it holds already.
      read: opens the images of a segment's source. The tokenizer that made the store must encode them. With the batch
        size of the build, the bytes equal those of a store that was built with everything at once.
      workers: the processes that share the work; None = this process alone.

    Raises:
      UserError: if an image is gone or has other codes now, another process writes to the store, or the disk is full.
    """
    workers = workers or Workers(store.directory, 0, 1)
    with exclusive_lock(store.directory) if workers.leads else contextlib.nullcontext():
        jobs = _jobs(store, keys, captions)
        counts = {jobs[place]: len(jobs[place].ids) for place in workers.share(range(len(jobs)))}
        opened = None  # only one segment's source is open at a time, because the list of a folder may be long
        for job, bar in in_turn(counts, [job for job in counts if job.absent], f"adding to {store.directory}", workers):
            if opened is not job.segment:
                opened, source = job.segment, read(job.segment.settings, "captions" in job.files)
            _write_shard(job, *source, bar)
        if workers.leads:
            workers.wait_until(lambda: not any(job.absent for job in jobs))
            _write_manifests(store, jobs)
        else:
            workers.wait_until(lambda: _holds(Datastore.open(store.directory).settings, keys, captions))
    return Datastore.open(store.directory)


def _holds(settings: StoreSettings, keys: tuple[str, ...], captions: bool) -> bool:
    return set(keys) <= set(settings.keys) and captions <= settings.captions


def _jobs(store: Datastore, keys: tuple[str, ...], captions: bool) -> list[_Job]:
    """Returns the jobs of all shards: those of the segments first, those of the store's own shards last."""
    jobs = []
    for segment in (*store.segments, store.alone):
        kept = segment.settings
        wanted = dataclasses.replace(kept, keys=all_keys(kept.keys, keys), captions=captions or kept.captions)
        jobs += [_Job(segment, wanted, shard) for shard in range(wanted.num_shards)]
    return jobs


def _write_shard(job: _Job, images: EncodedImages, numbers: Mapping[str, int], bar: Bar) -> None:
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
        bar.update(len(differ))
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
