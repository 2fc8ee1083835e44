"""Adds to a whole store what it was built without: latents for another kind of key, or the images' captions.

The source's images are read again, in the batches in which the store was built. Their codes must be the stored ones, so
that what is added belongs to them; then a shard's new files appear, each whole. They count once the manifests name
them: first those of the segments, the store's own last. Killed at any moment, the same call goes on with the next
shard, and readers have the store as it was until it has all. Codes, indexes and the store's fingerprint stay as they
are.
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

# Settings of a segment, and whether captions are wanted → its source's images, and the number of each by its id.
Reader = Callable[[StoreSettings, bool], tuple[EncodedImages, Mapping[str, int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One shard of one segment, and its settings with all that is wanted."""

    segment: Datastore
    wanted: StoreSettings
    shard: int

    @property
    def files(self) -> dict[str, str]:
        """Names of the shard's new files."""
        held = self.segment.settings.shard_files(self.shard)
        return {kind: name for kind, name in self.wanted.shard_files(self.shard).items() if kind not in held}

    @property
    def absent(self) -> dict[str, str]:
        """Those of them that are not there yet."""
        return {kind: name for kind, name in self.files.items() if not (self.segment.directory / name).is_file()}

    @property
    def ids(self) -> list[str]:
        """Where the shard's images came from."""
        return read_lines(self.segment.directory / self.segment.settings.shard_files(self.shard)["sources"])

    @property
    def stored_codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of the shard's images."""
        names = [self.segment.settings.shard_files(shard)["codes"] for shard in range(self.shard + 1)]
        counts = [self.segment.files[name]["images"] for name in names]
        return self.segment.codes_of(sum(counts[:-1]), sum(counts))


def all_keys(held: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of key of both; in the wanted order where that names all."""
    if set(wanted) == set(held):
        return held
    return wanted if set(held) <= set(wanted) else (*held, *(kind for kind in wanted if kind not in held))


def extend(
    store: Datastore, keys: tuple[str, ...], captions: bool, read: Reader, workers: Workers | None = None
) -> Datastore:
    """Adds what the store or a segment of it lacks of these keys and captions, or goes on with that.

    Args:
      store: whole.
      keys, captions: all that it is to hold; what it holds already stays.
      read: opens the images of a segment's source. The tokenizer that made the store encodes them; batches of the
        build's size give the bytes of a store that is built with all at once.
      workers: the processes that do it together; None = this one alone.

    Raises:
      UserError: an image is gone or gives other codes now, another process writes to the store, or the disk is full.
    """
    workers = workers or Workers(store.directory, 0, 1)
    with exclusive_lock(store.directory) if workers.leads else contextlib.nullcontext():
        jobs = _jobs(store, keys, captions)
        counts = {jobs[place]: len(jobs[place].ids) for place in workers.share(range(len(jobs)))}
        opened = None  # one segment's source at a time: the list of a folder may be long
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
    """All shards, the segments' first and the store's own last."""
    jobs = []
    for segment in (*store.segments, store.alone):
        kept = segment.settings
        wanted = dataclasses.replace(kept, keys=all_keys(kept.keys, keys), captions=captions or kept.captions)
        jobs += [_Job(segment, wanted, shard) for shard in range(wanted.num_shards)]
    return jobs


def _write_shard(job: _Job, images: EncodedImages, numbers: Mapping[str, int], bar: Bar) -> None:
    """Writes the new files of one shard, once its images have given the stored codes again."""
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
    """Writes the segments' manifests, then the store's own: what was there keeps its hashes, what is new gets them."""
    names = {segment.directory.name: segment.store_fingerprint for segment in store.segments}
    if names != store.manifest.get("parts", {}):  # stores made before named segments by the bytes of their manifests
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
