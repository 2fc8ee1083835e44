"""Builds hidden keys: runs a backbone over the codes and captions of a store, teacher-forced, and keeps its states.

A killed build continues with the next shard and writes the same bytes. The images themselves are not read again.
"""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Integer

from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, exclusive_lock, write_json
from arrag_jax.interfaces import Condition, PromptEncoder, StatefulBackbone
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import fit_projection
from arrag_jax.store import building
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import PROJECTION, HiddenFolder, HiddenSettings, digest_of, folder_of
from arrag_jax.store.record_files import write_array
from arrag_jax.store.shards import MANIFEST, facts_of, write_manifest
from arrag_jax.store.workers import Workers

FITTED_IMAGES = 512  # images whose states the projection is fitted on
FITTED_STATES = 2**16  # of these states, so many are used
RECORD_OPTIONS = "group_size:64,zstd:1"


class Known(NamedTuple):
    """What a backbone knows about the codes of n images.

    Attributes:
      states: the state from which each code is predicted.
      surprise: -log2 of each code's probability, in bits.
      excess: surprise minus the entropy of the predicted distribution, in bits.
    """

    states: Float[np.ndarray, "n T D"]
    surprise: Float[np.ndarray, "n T"]
    excess: Float[np.ndarray, "n T"]


class Reader:
    """Runs a backbone over images in batches of one shape; the local devices take turns."""

    def __init__(self, model: StatefulBackbone, text: PromptEncoder, captions: Sequence[str], batch_size: int):
        """
        Args:
          captions: all captions that will be read; they determine the length of a prompt. An image whose caption is
            empty is read without one, as guidance's unconditional rows are.
          batch_size: images per forward pass.

        Raises:
          UserError: if the model cannot read a caption, or there is no caption at all.
        """
        words = next(filter(None, captions), None)
        if words is None:
            raise UserError("hidden keys need captions, and no image of the store has one; use another kind of key")
        self._model, self._text, self._words, self._batch = model, text, words, batch_size
        self._length = text.length([caption or words for caption in captions])
        graph, state = nnx.split(model)
        self._graph = graph
        self._turns = itertools.cycle([(device, jax.device_put(state, device)) for device in jax.local_devices()])

    def read(self, codes: Integer[np.ndarray, "n T"], captions: Sequence[str]) -> Iterator[Known]:
        """Yields what the backbone knows about the images, in batches."""
        unfinished: deque[tuple[int, Any]] = deque()
        for first in range(0, len(codes), self._batch):
            part = slice(first, first + self._batch)
            number = len(codes[part])
            rows = np.resize(np.arange(first, first + number), self._batch)  # one shape, so one compiled program
            unfinished.append((number, self._run(codes[rows], [captions[int(i)] for i in rows])))
            if len(unfinished) > jax.local_device_count():
                yield _fetched(*unfinished.popleft())
        for number, answer in unfinished:
            yield _fetched(number, answer)

    def _run(self, codes: np.ndarray, captions: list[str]) -> Any:
        device, state = next(self._turns)
        given = self._model.check_condition(self._text([caption or self._words for caption in captions], self._length))
        condition = _without(given, self._model.unconditional(given), np.array([not caption for caption in captions]))
        arguments = jax.device_put((condition, codes.astype(np.int32)), device)
        return _run(self._graph, state, *arguments)


def _without(given: Condition, unconditional: Condition, wordless: Bool[np.ndarray, " B"]) -> Condition:
    """Returns the condition with the unconditional one in the rows ``wordless``."""

    def chosen(x: Any, y: Any) -> Any:
        return jnp.where(wordless.reshape(-1, *[1] * (x.ndim - 1)), y, x)

    return jax.tree.map(chosen, given, unconditional) if wordless.any() else given


@jax.jit(static_argnums=0)
def _run(graph, state, condition, codes):
    model = nnx.merge(graph, state)
    states = model.states(condition, codes)
    log_p = jax.nn.log_softmax(model.logits(states)) / jnp.log(2.0)
    surprise = -jnp.take_along_axis(log_p, codes[..., None], -1)[..., 0]
    entropy = -jnp.where(jnp.isneginf(log_p), 0, jnp.exp2(log_p) * log_p).sum(-1)
    return states.astype(jnp.float32), surprise, surprise - entropy


def _fetched(number: int, answer: Any) -> Known:
    known = Known(*(np.asarray(x)[:number] for x in answer))
    if not all(np.isfinite(x).all() for x in known):
        raise UserError("the backbone gave numbers that are not finite; its weights hold NaN or infinite numbers")
    return known


def add_hidden(
    store: Datastore,
    model: StatefulBackbone,
    text: PromptEncoder,
    numbers: int,
    batch_size: int,
    folder: str = "",
    workers: Workers | None = None,
) -> Datastore:
    """Builds the hidden keys of a backbone for every segment that lacks them, and returns the store with these keys.

    Args:
      store: a complete store with captions.
      numbers: E, the numbers per key; keys that exist already decide for later segments.
      batch_size: images per forward pass.
      folder: the model's folder, for the record.
      workers: the processes that share the work; None = this process alone.

    Raises:
      UserError: if the model's tokenizer did not make the store, the store has no captions, the model cannot read one,
        or ``numbers`` does not fit the model.
    """
    workers = workers or Workers(store.directory, 0, 1)
    backbone = model.backbone_fingerprint
    owners = [(segment, folder_of(segment.directory, backbone)) for segment in store.wholes]
    missing = [(segment, place) for segment, place in owners if not (place / MANIFEST).is_file()]
    if missing:
        captions = store.captions
        reader = Reader(model, text, captions, batch_size)
        if workers.leads:
            _write_projections(store, [place for _, place in owners], reader, numbers)
        for segment, place in missing:
            workers.wait_until((place / PROJECTION).exists)
            table = _read_projection(place / PROJECTION)
            _build(segment, place, reader, table, _settings(segment, table, backbone, batch_size, folder), workers)
    return dataclasses.replace(store, backbone=backbone)


def _write_projections(store: Datastore, places: list[Path], reader: Reader, numbers: int) -> None:
    """Writes the projection into each folder that lacks it; fits it to the store's states if no folder has one."""
    found = [place / PROJECTION for place in places if (place / PROJECTION).is_file()]
    table = _read_projection(found[0]) if found else _fitted(store, reader, numbers)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        if not (place / PROJECTION).exists():
            write_array(place / PROJECTION, "projection", table)


def _read_projection(path: Path) -> Float[np.ndarray, "D2 E"]:
    with np.load(path, allow_pickle=False) as file:
        return file["projection"]


def _fitted(store: Datastore, reader: Reader, numbers: int) -> Float[np.ndarray, "D2 E"]:
    """Returns a projection that is fitted to the states of images spread over the store."""
    images = np.unique(np.linspace(0, store.num_images - 1, FITTED_IMAGES).astype(np.int64))
    captions = [store.captions[i] for i in images]
    cells = int(np.prod(store.settings.grid))
    kept = max(1, -(-len(images) * cells // FITTED_STATES))  # every ``kept``-th state of the sequence
    codes, parts, first = store.codes[images].reshape(len(images), -1), [], 0
    for known in reader.read(codes, captions):
        flat = known.states.reshape(-1, known.states.shape[2])
        parts.append(flat[-first % kept :: kept])
        first += len(flat)
    states = np.concatenate(parts)
    if not 1 <= numbers <= min(states.shape):
        raise UserError(f"hidden_numbers={numbers}: {len(states):,} states of width {states.shape[1]} allow fewer")
    return fit_projection(states, numbers)


def _settings(
    segment: Datastore, table: Float[np.ndarray, "D2 E"], backbone: str, batch_size: int, folder: str
) -> HiddenSettings:
    kept = segment.settings
    return HiddenSettings(
        fingerprint=kept.fingerprint,
        grid=kept.grid,
        codebook_size=kept.codebook_size,
        num_images=segment.num_images,
        shard_size=kept.shard_size,
        source=kept.source,
        split=kept.split,
        backbone=backbone,
        width=len(table) - 2,
        numbers=table.shape[1],
        projection=digest_of(table),
        datastore=segment.store_fingerprint,
        batch_size=batch_size,
        model=folder,
    )


def _build(
    segment: Datastore,
    place: Path,
    reader: Reader,
    table: Float[np.ndarray, "D2 E"],
    settings: HiddenSettings,
    workers: Workers,
) -> None:
    """Builds the folder of one segment; several processes share its shards."""
    if (place / building.BUILDING).exists():
        building.require_same_settings(HiddenFolder, place, settings)
    with exclusive_lock(place) if workers.leads else contextlib.nullcontext():
        if workers.leads:
            write_json(place / building.BUILDING, dataclasses.asdict(settings))
        own = workers.share(range(settings.num_shards))
        absent = [shard for shard in building.missing_shards(place, settings) if shard in own]
        counts = {shard: len(settings.shard_images(shard)) for shard in own}
        for shard, bar in building.in_turn(counts, absent, f"hidden keys of {segment.directory}", workers):
            images, records = settings.shard_images(shard), []
            codes = segment.codes_of(images.start, images.stop).reshape(len(images), -1)
            for known in reader.read(codes, segment.captions[images.start : images.stop]):
                records.append(HIDDEN.records(*known, table))
                bar.update(len(known.states))
            rows = itertools.chain.from_iterable(records)
            building.write_records(place / settings.shard_files(shard)[HIDDEN.file], map(bytes, rows), RECORD_OPTIONS)
        if not workers.leads:
            workers.wait_until((place / MANIFEST).exists)
            return
        workers.wait_until(lambda: not building.missing_shards(place, settings))
        finish(place, settings)


def finish(place: Path, settings: HiddenSettings) -> None:
    """Writes the manifest of a folder whose shards are all written."""
    counts = {PROJECTION: {"images": 0}}
    for shard in range(settings.num_shards):
        counts[settings.shard_files(shard)[HIDDEN.file]] = {"images": len(settings.shard_images(shard))}
    files = {name: facts_of(place / name, count) for name, count in counts.items()}
    content = {"format_version": HiddenFolder.format_version, "settings": dataclasses.asdict(settings), "files": files}
    write_manifest(place, content)
    (place / building.BUILDING).unlink(missing_ok=True)


def copy_hidden(folder: HiddenFolder, images: Int[np.ndarray, " n"], target: Path, datastore: str) -> None:
    """Writes the hidden keys of some images of a folder into another one, unless that one is complete.

    Args:
      images: numbers of the images, ascending.
      datastore: fingerprint of the segment that holds the images.
    """
    if (target / MANIFEST).is_file():
        return
    settings = dataclasses.replace(folder.settings, num_images=len(images), datastore=datastore)
    target.mkdir(parents=True, exist_ok=True)
    with atomic_write(target / PROJECTION) as temporary:
        temporary.write_bytes((folder.directory / PROJECTION).read_bytes())
    for shard in range(settings.num_shards):
        part = settings.shard_images(shard)
        chosen = images[part.start : part.stop]
        records = folder.records_of(int(chosen[0]), int(chosen[-1]) + 1)[chosen - chosen[0]]
        building.write_records(target / settings.shard_files(shard)[HIDDEN.file], map(bytes, records), RECORD_OPTIONS)
    finish(target, settings)
