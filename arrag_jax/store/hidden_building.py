"""Builds hidden keys: runs a backbone over the codes and captions of a store, teacher-forced, and keeps its states.

A killed build continues with the next shard and writes the same bytes. The images themselves are not read again.
"""

import contextlib
import dataclasses
import functools
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
from arrag_jax.files import atomic_write, exclusive_lock, remove_temporary, write_json
from arrag_jax.interfaces import Condition, PromptEncoder, StatefulBackbone
from arrag_jax.models.checkpoint import load_model, load_prompts
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import fit_projection
from arrag_jax.store import building
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import PROJECTION, HiddenFolder, HiddenSettings, digest_of, folder_of
from arrag_jax.store.record_files import write_array
from arrag_jax.store.shards import MANIFEST, facts_of, write_manifest
from arrag_jax.work import HERE, Engine, Opened, Report, run_work

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


class Prompts(NamedTuple):
    """What the prompts of all images that a ``Reader`` reads have in common; see ``prompts_of``."""

    words: str  # stands in for an empty caption, whose row is then read without a condition
    length: int  # of a prompt, in the units of ``PromptEncoder.length``


def prompts_of(text: PromptEncoder, captions: Sequence[str]) -> Prompts:
    """Returns the common length of the captions' prompts.

    An image whose caption is empty is read without one, as guidance's unconditional rows are.

    Raises:
      UserError: if the model cannot read a caption, or there is no caption at all.
    """
    words = next(filter(None, captions), None)
    if words is None:
        raise UserError("hidden keys need captions, and no image of the store has one; use another kind of key")
    return Prompts(words, text.length([caption or words for caption in captions]))


def open_reader(folder: str, prompts: Prompts, batch_size: int) -> "Reader":
    """Returns a ``Reader`` by the model in a folder."""
    model: Any = load_model(folder)
    return Reader(model, load_prompts(folder), prompts, batch_size)


class Reader:
    """Runs a backbone over images in batches of one shape; the local devices take turns."""

    def __init__(self, model: StatefulBackbone, text: PromptEncoder, prompts: "Prompts", batch_size: int):
        """
        Args:
          prompts: the prompts that will be read.
          batch_size: images per forward pass.
        """
        self._model, self._text, self._batch = model, text, batch_size
        self._words, self._length = prompts
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
    engine: Engine = HERE,
) -> Datastore:
    """Builds the hidden keys of a backbone for every segment that lacks them, and returns the store with these keys.

    Args:
      store: a complete store with captions.
      numbers: E, the numbers per key; keys that exist already decide for later segments.
      batch_size: images per forward pass.
      folder: the model's folder, for the record and for workers elsewhere.
      engine: where the shards are read and written.

    Raises:
      UserError: if the model's tokenizer did not make the store, the store has no captions, the model cannot read one,
        or ``numbers`` does not fit the model.
    """
    backbone = model.backbone_fingerprint
    owners = [(segment, folder_of(segment.directory, backbone)) for segment in store.wholes]
    missing = [(segment, place) for segment, place in owners if not (place / MANIFEST).is_file()]
    if missing:
        prompts = prompts_of(text, store.captions)
        again = functools.partial(open_reader, folder, prompts, batch_size)
        reader = Opened(again, Reader(model, text, prompts, batch_size))
        table = _projection(store, [place for _, place in owners], reader, numbers, engine)
        jobs = {place: (segment, _settings(segment, table, backbone, batch_size, folder)) for segment, place in missing}
        _build(jobs, reader, store.directory, engine)
    return dataclasses.replace(store, backbone=backbone)


def _projection(
    store: Datastore, places: list[Path], reader: Opened[Reader], numbers: int, engine: Engine
) -> Float[np.ndarray, "D2 E"]:
    """Returns the projection after writing it into each folder that lacks it; fits it if no folder has one."""
    found = [place / PROJECTION for place in places if (place / PROJECTION).is_file()]
    table = _read_projection(found[0]) if found else None
    if engine.meet(f"projection of {store.directory}", "there" if found else "absent") == "absent":
        images = np.unique(np.linspace(0, store.num_images - 1, FITTED_IMAGES).astype(np.int64))
        codes, captions = store.codes[images].reshape(len(images), -1), [store.captions[i] for i in images]
        fit = functools.partial(_Fit, codes, captions, numbers, reader)
        label = f"projection of {store.directory}"
        fitted = [*run_work([0], fit, {0: len(images)}, label, noun="fit", kept=False, engine=engine)]
        table = fitted[0][1] if fitted else None  # the process that leads has it
    for place in places if engine.leads else ():
        place.mkdir(parents=True, exist_ok=True)
        if not (place / PROJECTION).exists():
            assert table is not None
            write_array(place / PROJECTION, "projection", table)
    engine.meet(f"files of the projection of {store.directory}")
    return _read_projection(places[0] / PROJECTION)


def _read_projection(path: Path) -> Float[np.ndarray, "D2 E"]:
    with np.load(path, allow_pickle=False) as file:
        return file["projection"]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """Returns a projection that is fitted to the states of these images; a worker of ``work`` for a single item."""

    codes: Integer[np.ndarray, "n T"]
    captions: list[str]
    numbers: int
    reader: Opened[Reader]

    def __call__(self, _: int, report: Report) -> Float[np.ndarray, "D2 E"]:
        kept = max(1, -(-self.codes.size // FITTED_STATES))  # every ``kept``-th state of the sequence
        parts, first = [], 0
        for known in self.reader().read(self.codes, self.captions):
            flat = known.states.reshape(-1, known.states.shape[2])
            parts.append(flat[-first % kept :: kept])
            first += len(flat)
            report.count(len(known.states))
        states = np.concatenate(parts)
        if not 1 <= self.numbers <= min(states.shape):
            raise UserError(
                f"hidden_numbers={self.numbers}: {len(states):,} states of width {states.shape[1]} allow fewer"
            )
        return fit_projection(states, self.numbers)


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
    jobs: dict[Path, tuple[Datastore, HiddenSettings]], reader: Opened[Reader], directory: Path, engine: Engine
) -> None:
    """Builds the folders of segments: folder → (its segment, its settings). ``directory`` is the store's folder."""
    for place, (_, settings) in jobs.items():
        if (place / building.BUILDING).exists():
            building.require_same_settings(HiddenFolder, place, settings)
    with contextlib.ExitStack() as locks:
        for place, (_, settings) in jobs.items() if engine.leads else ():
            locks.enter_context(exclusive_lock(place))
            write_json(place / building.BUILDING, dataclasses.asdict(settings))
        engine.meet(f"start of hidden keys of {directory}")
        sizes, left = {}, []
        for place, (segment, settings) in jobs.items():
            missing = building.missing_shards(place, settings)
            for shard in range(settings.num_shards):
                item = str(segment.directory), str(place), shard
                sizes[item] = len(settings.shard_images(shard))
                left += [item] if shard in missing else []
        for _ in run_work(
            left, functools.partial(_StateWriter, reader), sizes, f"hidden keys of {directory}", engine=engine
        ):
            pass
        for place, (_, settings) in jobs.items() if engine.leads else ():
            finish(place, settings)
    engine.meet(f"hidden keys of {directory}")


@dataclasses.dataclass(frozen=True)
class _StateWriter:
    """Writes shards of hidden keys: (folder of a segment, folder of its keys, shard); a worker of ``work``."""

    reader: Opened[Reader]

    def __call__(self, item: tuple[str, str, int], report: Report) -> None:
        directory, place, shard = item
        segment, table = _segment(directory), _read_projection(Path(place) / PROJECTION)
        settings, records = building.read_building(HiddenFolder, Path(place)), []
        images = settings.shard_images(shard)
        codes = segment.codes_of(images.start, images.stop).reshape(len(images), -1)
        for known in self.reader().read(codes, segment.captions[images.start : images.stop]):
            records.append(HIDDEN.records(*known, table))
            report.count(len(known.states))
        rows = itertools.chain.from_iterable(records)
        path = Path(place) / settings.shard_files(shard)[HIDDEN.file]
        building.write_records(path, map(bytes, rows), RECORD_OPTIONS)


@functools.lru_cache(1)
def _segment(directory: str) -> Datastore:
    """Returns an opened segment, whose captions are read only once."""
    return Datastore.open(directory).alone


def finish(place: Path, settings: HiddenSettings) -> None:
    """Writes the manifest of a folder whose shards are all written."""
    counts = {PROJECTION: {"images": 0}}
    for shard in range(settings.num_shards):
        counts[settings.shard_files(shard)[HIDDEN.file]] = {"images": len(settings.shard_images(shard))}
    files = {name: facts_of(place / name, count) for name, count in counts.items()}
    content = {"format_version": HiddenFolder.format_version, "settings": dataclasses.asdict(settings), "files": files}
    write_manifest(place, content)
    (place / building.BUILDING).unlink(missing_ok=True)
    remove_temporary(place)


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
