"""Builds, merges, verifies and measures stores with their indexes, for the command ``build_datastore``.

It is part of ``retrieval`` because the package ``store`` does not depend on indexes.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from arrag_jax.config import DatastoreConfig, RayConfig, RetrievalConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.interfaces import StatefulBackbone
from arrag_jax.json_files import MAX_BYTES, read_bounded
from arrag_jax.models.checkpoint import load_model, load_prompts, load_tokenizer
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.processes import require_same
from arrag_jax.retrieval import index
from arrag_jax.retrieval import report as measure
from arrag_jax.retrieval.load import settled, spread
from arrag_jax.retrieval.scann_rules import BY_RULE
from arrag_jax.store import forgetting, from_images, rights, segments
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import backbones_in, joined
from arrag_jax.store.hidden_building import Reader, add_hidden, prompts_of
from arrag_jax.store.images import told_of
from arrag_jax.store.shards import MANIFEST
from arrag_jax.work import HERE, Engine


def build(
    config: DatastoreConfig | None,
    directory: Path,
    append: bool = False,
    keep_duplicates: bool = False,
    engine: Engine = HERE,
) -> None:
    """Builds the store of the config's images in ``directory`` and its indexes; resumes an unfinished build.

    If the store is complete, this adds the keys, captions and indexes that it lacks. Every process of a run calls this.

    Args:
      config: the images, settings and indexes; None = only rebuild the indexes of a complete store that do not fit it.
      directory: the store's folder.
      append: add the images that a complete store does not hold yet.
      keep_duplicates: store all images of equal content.
      engine: where images are encoded.

    Raises:
      UserError: if there is neither a config nor a complete store, or as in ``from_images``.
    """
    start = time.perf_counter()
    if config is None:
        if not (directory / MANIFEST).is_file():
            raise UserError("missing --config (see --help)")
        if engine.leads:
            _finish(Datastore.open(directory), None, start, engine.alone())
        return
    asked, config = config, _without_hidden(config)
    tokenizer = load_tokenizer(config.model)
    require_same({f"tokenizer of {config.model}": tokenizer.fingerprint}, "model")
    config = from_images.with_what_is_held(config, directory, tokenizer, engine, append)
    what = (config, directory, tokenizer, engine, keep_duplicates)
    if append:
        store = from_images.add(*what, partial(_new_indexes, asked, engine.alone()))
        if not engine.leads:
            return
        engine = engine.alone()  # the other processes do not have the new store
    else:
        built = from_images.build(*what)
        assert built is not None  # a source without images is a UserError
        store = built
    if HIDDEN.name in asked.keys:
        store = _with_hidden(store, asked, engine)
    if engine.leads:
        _finish(store, asked, start, engine.alone())


def merge(
    stores: Collection[str],
    directory: Path,
    keep_duplicates: bool = False,
    config: DatastoreConfig | None = None,
    excess_above: float | None = None,
) -> None:
    """Merges stores into one in ``directory`` and builds the config's indexes (None = no new index).

    Args:
      excess_above: take only images whose codes have more excess than this, in bits per image; None = all images. The
        excess is that of the backbone of ``config.model``, or of the only backbone whose hidden keys a store has.
    """
    start = time.perf_counter()
    opened = [Datastore.open(store) for store in stores]
    backbone = load_model(config.model) if config is not None and HIDDEN.name in config.keys else None
    fingerprint = getattr(backbone, "backbone_fingerprint", "")
    wanted = None if excess_above is None else _known_least(opened, fingerprint, excess_above)
    merged = segments.merge(opened, directory, keep_duplicates, wanted)
    _finish(dataclasses.replace(merged, backbone=fingerprint), config, start)


def _known_least(stores: Sequence[Datastore], backbone: str, bits: float) -> segments.Wanted:
    """Returns the choice of the images with more than this many bits of excess."""
    held = sorted({name for store in stores for name in backbones_in(store.directory)})
    if not backbone and len(held) != 1:
        found = f"those of {', '.join(held)}" if held else "none"
        raise UserError(
            f"--excess_above needs hidden keys of one backbone, the stores have {found}; add: "
            f"{stores[0].further('--config.keys=codebook,hidden')}, or name the backbone: --config.model"
        )
    backbone = backbone or held[0]

    def chosen(segment: Datastore) -> Bool[np.ndarray, " n"]:
        own = dataclasses.replace(segment, backbone=backbone)
        told = joined(folder.told() for folder in own.hidden)
        return told.mean_excess * told.excess.shape[1] > bits

    return segments.Wanted(f"more than {bits:g} bits of excess under backbone {backbone}", chosen)


def forget(directory: Path, names: Sequence[str], listed: str = "") -> None:
    """Hides images from every search, and prints how many; see ``store.forgetting``.

    Args:
      listed: a file with one more name per line; "" = none.

    Raises:
      UserError: as in ``forgetting.forget``, or if the file cannot be read.
    """
    if listed:
        text = read_bounded(Path(listed), MAX_BYTES, "no list of names").decode("utf-8", "surrogateescape")
        names = [*names, *filter(None, text.splitlines())]
    store = forgetting.forget(directory, names)
    hidden = store.num_images - store.num_shown
    print(
        f"datastore {directory}: {hidden:,} of {store.num_images:,} images are forgotten; --purge removes their bytes"
    )


def record_rights(directory: Path, given: Path) -> None:
    """Records licences and sources of a store's images, and prints how many are known; see ``store.rights``."""
    store = Datastore.open(directory)
    known = rights.record(directory, store.sources, given)
    count = Counter(each.licence or rights.UNKNOWN for each in known.values())
    told = ", ".join(f"{licence} {number:,}" for licence, number in sorted(count.items()))
    print(f"datastore {directory}: rights of {len(known):,} of {store.num_images:,} images are known ({told})")


def purge(directory: Path) -> None:
    """Rewrites a store without its forgotten images, with the kinds of index that it had; see ``store.forgetting``."""
    start, old = time.perf_counter(), Datastore.open(directory)
    held = [dataclasses.replace(old, backbone=name) for name in backbones_in(directory)]
    pairs = [(old, kind) for kind in old.settings.keys] + [(store, HIDDEN.name) for store in held]
    indexes = [
        (kind, store.backbone, index.saved_shards(store, kind))
        for store, kind in pairs
        if index.index_directory(store, kind).exists()
    ]
    store = forgetting.purge(directory)
    for kind, backbone, shards in indexes:
        index.build_index(dataclasses.replace(store, backbone=backbone), kind, BY_RULE, shards)
    print(f"datastore {directory} holds {store.num_images:,} images, {time.perf_counter() - start:.1f} s")


def verify(directory: Path) -> None:
    """Checks every file of a store and of its indexes, and prints one line if none is damaged.

    Raises:
      UserError: if a file is damaged.
    """

    def verified() -> Datastore:
        store = Datastore.open(directory)
        store.verify()
        index.verify_indexes(store)
        return store

    store = settled(directory, verified)
    print(f"datastore {directory} is as it was written: {store.num_images:,} images")


def report(directory: Path, config: DatastoreConfig | None = None, ray: str = "") -> None:
    """Measures each index of a store and prints the figures.

    For hidden keys of the backbone of ``config.model`` (None = of the model that built the store), it also prints how
    many images of each source have how much excess.

    Args:
      ray: measures the search that is spread over the machines of this cluster, as in ``on_ray.join``; "" = in here.
    """
    options = BY_RULE if config is None else config.scann

    def measured() -> tuple[dict[str, tuple[dict[str, float | int], list[dict]]], dict[str, list[int]]]:
        store = Datastore.open(directory)
        if not ray:
            return _measured_here(store, options, config)
        found = {}
        for kind in measure.indexed(store):
            k = min(measure.NEIGHBORS[0], store.num_patches)
            asked = RetrievalConfig(str(directory), k, kind, "ray", scann=options, ray=RayConfig(ray))
            search = spread(asked, store, True, store.settings.fingerprint, "")
            found[kind] = measure.report_shares(store, search, kind)
        return found, {}

    indexes, excess = settled(directory, measured)
    for kind, (figures, nodes) in indexes.items():
        print(f"index over {kind} keys")
        for name, figure in figures.items():
            print(f"{name:20}{figure:>16,.4f}" if isinstance(figure, float) else f"{name:20}{figure:>16,}")
        for node in nodes:
            print(f"on {node['node']}: {node['rows']:,} patches, {node['bytes']:,} bytes, {node['ms']:.2f} ms per call")
    for source, counts in excess.items():
        limits = [*(f"up to {limit:g}" for limit in measure.EXCESS), "more"]
        shown = ", ".join(f"{limit}: {count:,}" for limit, count in zip(limits, counts, strict=True))
        print(f"images of {source} by their excess in bits: {shown}")


def _measured_here(
    store: Datastore, options: ScannOptions, config: DatastoreConfig | None
) -> tuple[dict[str, tuple[dict[str, float | int], list[dict]]], dict[str, list[int]]]:
    """Returns the figures of each index of a store, and how many images of each source have how much excess."""
    figures: dict[str, tuple[dict[str, float | int], list[dict]]]
    figures = {kind: (measure.report(store, options, kind), []) for kind in measure.indexed(store)}
    folder = store.settings.model if config is None else config.model
    if not folder or not backbones_in(store.directory):
        return figures, {}
    model: Any = load_model(folder)
    store, text = dataclasses.replace(store, backbone=model.backbone_fingerprint), load_prompts(folder)
    if index.fits(store, HIDDEN.name):
        reader = Reader(model, text, prompts_of(text, store.captions), measure.STATE_IMAGES)
        states = measure.held_out_states(store, reader)
        figures[HIDDEN.name] = measure.report(store, options, HIDDEN.name, states), []
    return figures, measure.excess_by_source(store)


def _without_hidden(config: DatastoreConfig) -> DatastoreConfig:
    """Returns the config of the store's own files, which hold no hidden keys."""
    if HIDDEN.name not in config.keys:
        return config
    rest = tuple(kind for kind in config.keys if kind != HIDDEN.name) or DatastoreConfig.keys
    indexes = tuple(kind for kind in config.indexes if kind != HIDDEN.name)
    return dataclasses.replace(config, keys=rest, indexes=indexes, captions=True)


def _with_hidden(store: Datastore, config: DatastoreConfig, engine: Engine = HERE) -> Datastore:
    """Returns the store with the hidden keys of the config's model; builds those that are missing."""
    model: Any = load_model(config.model)
    if not isinstance(model, StatefulBackbone):
        raise UserError(f"{config.model} has no backbone that gives its states; hidden keys need one")
    text, numbers = load_prompts(config.model), config.hidden_numbers
    return add_hidden(store, model, text, numbers, config.batch_size, config.model, engine)


@contextlib.contextmanager
def _new_indexes(config: DatastoreConfig, engine: Engine, store: Datastore) -> Iterator[None]:
    """Builds the config's hidden keys and its indexes in temporary folders; on exit they replace the old indexes."""
    store = _with_hidden(store, config, engine) if HIDDEN.name in config.keys else store
    with contextlib.ExitStack() as stack:
        for kind in config.indexes:
            stack.enter_context(index.new_index(store, kind, config.scann, config.index_shards, engine))
        yield


def _finish(store: Datastore, config: DatastoreConfig | None, start: float, engine: Engine = HERE) -> None:
    """Builds the requested indexes that do not exist yet, and prints what the store holds."""
    kinds: Sequence[str]
    if config is None:  # indexes that fit stay, because they may have other options
        kinds, options = [kind for kind in measure.indexed(store) if not index.fits(store, kind)], (ScannOptions(), 1)
    else:
        kinds, options = config.indexes, (config.scann, config.index_shards)
    for kind in kinds:
        index.refresh_index(store, kind, *options, engine)
    size = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    held = (*store.settings.keys, HIDDEN.name) if store.backbone else store.settings.keys
    there = ", ".join(kind for kind in held if index.fits(store, kind))
    indexes = f"ScaNN over {there} keys" if there else "no index"
    left_out = told_of(store.wholes, "that cannot be read", store.num_duplicates)
    wordless = f" ({sum(not words for words in store.captions):,} without caption)" if store.settings.captions else ""
    print(
        f"datastore {store.directory} is complete: {store.num_images:,} images{wordless}{left_out}, "
        f"{store.num_patches:,} patches, {indexes}, {size:,} bytes, {time.perf_counter() - start:.1f} s"
    )
