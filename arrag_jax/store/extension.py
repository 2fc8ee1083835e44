"""Adds to a whole store what it was built without: latents for another kind of key, or the images' captions.

The source's images are read again, in the batches in which the store was built. Their codes must be the stored ones, so
that what is added belongs to them; then a shard's new files appear, each whole. They count once the manifests name
them: first those of the parts, the store's own last. Killed at any moment, the same call goes on with the next shard,
and readers have the store as it was until it has all. Codes, indexes and the store's fingerprint stay as they are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrag_jax import progress
from arrag_jax.data.examples import BadImage, Example, Examples
from arrag_jax.errors import UserError
from arrag_jax.files import exclusive_lock
from arrag_jax.progress import Bar
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import Encode, encoded
from arrag_jax.store.left_out import read_lines
from arrag_jax.store.shards import content_of, facts_of, write_manifest
from arrag_jax.store.workers import Workers
from arrag_jax.store.writer import write_files

# Settings of a part, and whether captions are wanted → its source's images, and the number of each by its id.
Reader = Callable[[StoreSettings, bool], tuple[Examples, Mapping[str, int]]]


class _Job(NamedTuple):
    """One shard of one part, and its settings with all that is wanted."""

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


def all_keys(held: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of key of both; in the wanted order where that names all."""
    if set(wanted) == set(held):
        return held
    return wanted if set(held) <= set(wanted) else (*held, *(kind for kind in wanted if kind not in held))


def extend(
    store: Datastore,
    keys: tuple[str, ...],
    captions: bool,
    read: Reader,
    encode: Encode,
    batch_size: int,
    workers: Workers | None = None,
) -> Datastore:
    """Adds what the store or a part of it lacks of these keys and captions, or goes on with that.

    Args:
      store: whole.
      keys, captions: all that it is to hold; what it holds already stays.
      read: how the images of a part's source are had.
      encode: by the tokenizer that made the store.
      batch_size: images a call of ``encode``; that of the build gives the bytes of a store built with all at once.
      workers: the processes that do it together; None = this one alone.

    Raises:
      UserError: an image is gone or gives other codes now, another process writes to the store, or the disk is full.
    """
    workers = workers or Workers(store.directory, 0, 1)
    if workers.leads:
        with exclusive_lock(store.directory):
            _write_shards(store, keys, captions, read, encode, batch_size, workers)
            jobs = _jobs(store, keys, captions)
            workers.wait_until(lambda: not any(job.absent for job in jobs))
            _write_manifests(store, jobs)
    else:
        _write_shards(store, keys, captions, read, encode, batch_size, workers)

        def whole() -> bool:
            settings = Datastore.open(store.directory).settings
            return set(keys) <= set(settings.keys) and captions <= settings.captions

        workers.wait_until(whole)
    return Datastore.open(store.directory)


def _jobs(store: Datastore, keys: tuple[str, ...], captions: bool) -> list[_Job]:
    """All shards, the parts' first and the store's own last."""
    jobs = []
    for segment in (*store.segments, store.alone):
        both = {"keys": all_keys(segment.settings.keys, keys), "captions": captions or segment.settings.captions}
        wanted = dataclasses.replace(segment.settings, **both)
        jobs += [_Job(segment, wanted, shard) for shard in range(wanted.num_shards)]
    return jobs


def _write_shards(
    store: Datastore,
    keys: tuple[str, ...],
    captions: bool,
    read: Reader,
    encode: Encode,
    batch_size: int,
    workers: Workers,
) -> None:
    """Writes the new files of this process's shards that are not there yet."""
    jobs = _jobs(store, keys, captions)
    own = [jobs[place] for place in workers.share(range(len(jobs)))]
    left = [job for job in own if job.absent]
    total, todo = (sum(len(_ids(job)) for job in some) for some in (own, left))
    source: tuple[Path | None, Any] = (None, None)  # of one part at a time: the list of a folder may be long
    with progress.bar(total=total, initial=total - todo, unit="image", desc=f"adding to {store.directory}") as bar:
        for job in left:
            if source[0] != job.segment.directory:
                source = (
                    job.segment.directory,
                    read(job.segment.settings, captions and not job.segment.settings.captions),
                )
            _write_shard(job, *source[1], encode, batch_size, bar)


def _write_shard(
    job: _Job, examples: Examples, numbers: Mapping[str, int], encode: Encode, batch_size: int, bar: Bar
) -> None:
    """The new files of one shard, once its images have given the stored codes again."""
    ids, place = _ids(job), f"{job.segment.directory} (source {job.segment.settings.source})"
    gone = [id_ for id_ in ids if id_ not in numbers]
    if gone:
        raise UserError(
            f"{len(gone):,} images of {place} are no longer there ({'; '.join(gone[:3])}); put them back, or build "
            "another datastore with all keys at once in another --workdir"
        )
    before = sum(
        job.segment.files[job.segment.settings.shard_files(shard)["codes"]]["images"] for shard in range(job.shard)
    )
    stored = job.segment.codes_of(before, before + len(ids))

    def checked() -> Iterator[tuple[list[Example], np.ndarray, np.ndarray]]:
        done, own = 0, _Some(examples, [numbers[id_] for id_ in ids])
        for batch in encoded(own, range(len(ids)), encode, batch_size, job.wanted, lost):
            differ = (batch[1] != stored[done : done + len(batch[1])]).any((1, 2))
            if differ.any():
                raise UserError(
                    f"{ids[done + int(differ.argmax())]} has other codes than {place} holds: the image, or the machine "
                    f"or batch size ({batch_size}) that encodes it, is another; build another datastore in another "
                    "--workdir"
                )
            done += len(differ)
            yield batch

    def lost(number: int, reason: BadImage) -> None:
        raise UserError(f"{ids[number]} of {place} can no longer be read: {reason}; put it back and run this again")

    write_files(job.segment.directory, job.absent, checked(), bar)


def _ids(job: _Job) -> list[str]:
    """Where the shard's images came from."""
    return read_lines(job.segment.directory / job.segment.settings.shard_files(job.shard)["sources"])


class _Some:
    """Some of a source's examples, in another order."""

    def __init__(self, examples: Examples, numbers: list[int]):
        self.examples, self.numbers = examples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.numbers[index]]


def _write_manifests(store: Datastore, jobs: list[_Job]) -> None:
    """The parts' manifests, then the store's own: what was written before keeps its hashes, what is new gets them."""
    names = {segment.directory.name: segment.store_fingerprint for segment in store.segments}
    if names != store.manifest.get("parts", {}):  # stores made before named parts by the bytes of their manifests
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
