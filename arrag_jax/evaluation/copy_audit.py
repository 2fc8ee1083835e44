"""Looks for copies of a store's images among the images of a run, and among the true images that it is compared with.

A score or a distance that was reached by copying must be recognised, so every run that has a store is audited. The
codes of drawn images stand in their files; other images are encoded by the tokenizer of the store.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from arrag_jax.config import DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.feature_store import FeatureStore
from arrag_jax.evaluation.image_codes import codes_in
from arrag_jax.evaluation.image_sets import ImageSet, drawn_set
from arrag_jax.evaluation.intervals import bootstrap
from arrag_jax.evaluation.measurements import figure_of
from arrag_jax.evaluation.metrics.features import Extractor
from arrag_jax.evaluation.nearest_stored import Nearest, nearest_stored
from arrag_jax.files import atomic_write
from arrag_jax.interfaces import Figure, FolderBenchmark, ImageFile, Measurement
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval.copies import COPIED
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import encoder
from arrag_jax.store.shown import NO_CODE
from arrag_jax.work import HERE, Engine, Opened

COPIES, TRUE_COPIES = "copies.jsonl", "true_copies.jsonl"
CACHE = ".codes"  # in the folder of a run: codes of images that another program drew
CHUNK = 4096  # stored images that are read at once
LEAST_COVERED = 0.5  # share of an image that a moved copy covers at least
NAME, NO_STORE = "copied", "none"


@runtime_checkable
class HasTrueImages(Protocol):
    """A ``FolderBenchmark`` that compares with images."""

    def true_images(self) -> tuple[ImageSet, FeatureStore] | None:
        """Returns the images, and where what is computed of them is kept; None if only statistics are given."""
        ...


class Parts(NamedTuple):
    """The codes of images, several of which may stand in one file."""

    file: Int[np.ndarray, " n"]  # number of the file
    grids: Int[np.ndarray, "n H W"]


def copies_of(found: Nearest) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns which images are copies in place, and which are copies wherever the stored image was moved.

    At least a share ``COPIED`` of the codes is equal: of the whole image, or of the part that the moved image covers if
    that is ``LEAST_COVERED`` of the image or more.
    """
    whole = found.share >= COPIED
    return whole, whole | ((found.covered >= LEAST_COVERED) & (found.share >= COPIED * found.covered))


def audited(
    measured: Measurement,
    folder: Path,
    images: Sequence[ImageFile],
    benchmark: FolderBenchmark,
    store: Datastore,
    engine: Engine = HERE,
) -> tuple[Measurement, dict[str, Any]]:
    """Returns a measurement with the figures of the audit, and what these depend on.

    Writes copies.jsonl, and true_copies.jsonl if there are true images: a line per image with the nearest stored one.

    Args:
      engine: where images without codes are encoded.

    Raises:
      UserError: if an image cannot be read, or the store is damaged.
    """
    notes: list[str] = []
    per_file = benchmark.copies // len(benchmark.layout.files(images[0].prompt, benchmark.copies))
    parts = _drawn_parts(folder, images, per_file, store, notes, engine)
    true = benchmark.true_images() if isinstance(benchmark, HasTrueImages) else None
    facts = {"store": str(store.directory), "fingerprint": store.store_fingerprint, "share": COPIED}
    figures, values = dict(measured.figures), dict(measured.values)
    if len(parts.grids):
        found = nearest_stored(parts.grids, _chunks(store))
        _write(folder / COPIES, [images[i].path for i in parts.file.tolist()], found, store)
        names = [images[i].prompt.name for i in parts.file.tolist()]
        for name, copied in zip((NAME, f"{NAME}, also moved"), copies_of(found), strict=True):
            values[name] = _by_prompt(names, copied)
            figures[name] = figure_of(values, (name,))
    if true is not None and (extractor := _extractor_of(store)) is not None:
        grids = _encoded(*true, extractor, store, "true images", engine)
        found = nearest_stored(grids, _chunks(store))
        _write(folder / TRUE_COPIES, true[0].ids, found, store)
        stored = copies_of(found)[1]
        figures["true images in the store"] = Figure(*bootstrap(stored[None].astype(np.float64)))
        if stored.any():
            notes.append(
                f"{int(stored.sum())} of {len(stored)} true images are in the store: a copy of one is no merit"
            )
    elif true is not None:
        notes.append(f"true images were not looked for in {store.directory}: the model that made it is not there")
    return Measurement(figures, values, (*measured.notes, *notes)), facts


def store_for(given: str, drawn: Mapping[str, Any] | None, config: DrawConfig | None) -> Datastore | str:
    """Returns the store to look for copies in, or a note that says why there is none; "" if none is configured.

    Args:
      given: folder of the store; "" = the one that the images were drawn with, else that of the config; "none" = none.
      drawn: the settings in run.json; None = there are none.

    Raises:
      UserError: if ``given`` is no store.
    """
    if given == NO_STORE:
        return ""
    if given:
        return Datastore.open(given)
    named = (drawn or {}).get("store") or (config.retrieval.store if config else "")
    if not named or named == NO_STORE:
        return ""
    try:
        return Datastore.open(named)
    except UserError:
        return f"copies were not looked for: there is no datastore at {named}; give another one as --copies_of"


def _chunks(store: Datastore) -> Iterator[np.ndarray]:
    for first in range(0, store.num_images, CHUNK):
        end = min(first + CHUNK, store.num_images)
        grids = store.codes_of(first, end)
        yield grids if store.shown is None else np.where(store.shown[first:end, None, None], grids, NO_CODE)


def _drawn_parts(
    folder: Path, images: Sequence[ImageFile], per_file: int, store: Datastore, notes: list[str], engine: Engine
) -> Parts:
    """Returns the codes of drawn images; files without codes are encoded, if the tokenizer is there."""
    height, width = store.settings.grid
    numbers: list[int] = []
    grids: list[np.ndarray] = []
    without: list[int] = []
    for number, image in enumerate(images):
        codes, tokenizer = codes_in(folder / image.path) or (np.zeros((0, 0), np.int64), "")
        down, right = codes.shape[0] // height, codes.shape[1] // width
        is_ours = tokenizer == store.settings.fingerprint and codes.shape == (down * height, right * width)
        if not is_ours or down * right != per_file:
            without.append(number)
            continue
        grids += list(codes.reshape(down, height, right, width).swapaxes(1, 2).reshape(-1, height, width))
        numbers += [number] * per_file
    if without and per_file == 1 and (found := _extractor_of(store)) is not None:
        rest = drawn_set(folder, [images[i] for i in without])
        grids += list(_encoded(rest, FeatureStore(folder / CACHE), found, store, "drawn images", engine))
        numbers += without
        notes.append(
            f"{len(without)} images hold no codes of the store's tokenizer: they were encoded, and copies among them "
            "may be overlooked"
        )
    elif without:
        notes.append(f"{len(without)} images hold no codes of the store's tokenizer: no copies were looked for in them")
    order = np.argsort(numbers, kind="stable")
    return Parts(np.array(numbers, int)[order], np.array(grids, int).reshape(-1, height, width)[order])


def _extractor_of(store: Datastore) -> Opened[Extractor] | None:
    """Returns what encodes images as those of a store; None if the model that made it is not there any more."""
    again = functools.partial(_codes_extractor, store.settings.model, store.settings.grid)
    try:
        opened = again()
    except UserError:
        return None
    return Opened(again, opened) if opened.name == _name_of(store.settings.fingerprint) else None


def _codes_extractor(model: str, grid: tuple[int, int]) -> Extractor:
    """Returns the tokenizer of a model as a network whose features are codes."""
    tokenizer = load_tokenizer(model).with_grid(grid)
    encode = encoder(tokenizer)

    def prepare(image: np.ndarray) -> np.ndarray:
        return image.astype(np.float32)

    def embed(batch: np.ndarray) -> Any:
        return encode(batch.astype(np.uint8))[0].reshape(len(batch), -1).astype(np.float32)

    return Extractor(_name_of(tokenizer.fingerprint), grid[0] * grid[1], prepare, embed, tokenizer.image_size)


def _name_of(fingerprint: str) -> str:
    return f"codes, tokenizer {fingerprint}"


def _encoded(
    images: ImageSet, kept: FeatureStore, extractor: Opened[Extractor], store: Datastore, what: str, engine: Engine
) -> Int[np.ndarray, "n H W"]:
    """Returns the codes of image files, prepared as for the store."""
    codes, _ = kept.features(images, extractor, f"{what}: codes", engine)
    return codes.astype(np.int64).reshape(-1, *store.settings.grid)


def _write(path: Path, files: Sequence[str], found: Nearest, store: Datastore) -> None:
    rows = zip(files, found.number.tolist(), found.shift.tolist(), found.share.tolist(), strict=True)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name, number, shift, share in rows:
            nearest = {"nearest": store.sources[number] if number >= 0 else None, "moved": shift, "share": share}
            file.write(json.dumps({"filename": name, **nearest}, ensure_ascii=False) + "\n")


def _by_prompt(names: Sequence[str], flags: Bool[np.ndarray, " n"]) -> Mapping[str, tuple[float, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, flag in zip(names, flags.tolist(), strict=True):
        groups[name].append(float(flag))
    return {name: (float(np.mean(group)), float(len(group))) for name, group in groups.items()}
