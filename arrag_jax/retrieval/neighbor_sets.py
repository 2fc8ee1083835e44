"""Builds neighbour sets of the images that a config names, by leave-one-out search of a store."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.config import NeighborsConfig
from arrag_jax.data import sources
from arrag_jax.files import require_within
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.models.checkpoint import load_model, load_prompts, load_tokenizer
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.keys.hidden import project
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.leave_one_out import LeaveOneOut
from arrag_jax.retrieval.load import backbone_of, load_retriever, resolved
from arrag_jax.retrieval.states import HiddenRetriever
from arrag_jax.store import writer
from arrag_jax.store.building import require_same_settings, state_of
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.hidden_building import Reader, prompts_of
from arrag_jax.store.images import LISTING, ImageSource, encoder, names_below, names_in, origin_of, told_of
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings
from arrag_jax.store.skipped import SkipLimit
from arrag_jax.store.writer import NO_CAPTION
from arrag_jax.work import HERE, Engine, Opened


def build(config: NeighborsConfig, directory: Path, engine: Engine = HERE) -> None:
    """Builds the neighbour sets of two splits in ``directory``/train and /valid; resumes an unfinished build.

    Args:
      engine: where images are encoded and searched.

    Raises:
      UserError: as in ``load_retriever``, ``ImageSource`` and ``writer.build_neighbor_set``.
    """
    start = time.perf_counter()
    config = dataclasses.replace(config, retrieval=resolved(config.retrieval))
    tokenizer, store, retriever = _opened(config)
    named = {"train": config.train_split, "valid": config.valid_split}
    splits = {require_within(directory, directory / name): split for name, split in named.items()}
    there = {folder: state_of(NeighborSet, folder) for folder in splits}
    states = {state for state, _ in there.values()}
    state = states.pop() if len(states) == 1 else "begun"
    spelt = sources.spelt_alike(config.source, [settings.source for _, settings in there.values() if settings])
    config = dataclasses.replace(config, source=spelt)
    source = ImageSource(
        config.source, config.data_dir, True, tokenizer, state, directory / LISTING, columns=config.columns
    )
    jobs = {}
    for folder, split in splits.items():
        images = source.images(split)
        number = there[folder][1].num_images if state == "whole" else len(images)
        settings = settings_of(config, store, tokenizer, split, number)
        jobs[folder] = images, dataclasses.replace(settings, origin=origin_of(config.source), beside=source.beside)
    for folder, (_, settings) in jobs.items():
        require_same_settings(NeighborSet, folder, settings)  # both are checked before the first build starts
    source.keep_listing()
    encode = encoder(tokenizer)
    search = Opened(functools.partial(_open_search, config), _search(config, tokenizer, store, retriever))
    for folder, (images, settings) in jobs.items():
        encoded = Opened(
            functools.partial(_encoded_again, config, splits[folder], directory / LISTING),
            EncodedImages(images, images.source_id, encode, config.batch_size),
        )
        limit = SkipLimit(config.max_bad_fraction, config.min_bad)
        _say(writer.build_neighbor_set(folder, encoded, search, settings, limit, engine), start)
    (directory / LISTING).unlink(missing_ok=True)


def _opened(config: NeighborsConfig) -> tuple[Any, Datastore, Any]:
    """Returns the model (its tokenizer alone, unless its states are searched), the store and the search."""
    keys = config.retrieval.keys
    model: Any = (load_model if KEY_KINDS[keys].query_from == "state" else load_tokenizer)(config.model)
    return model, *load_retriever(config.retrieval, model.fingerprint, backbone=backbone_of(model, keys))


def _search(config: NeighborsConfig, model: Any, store: Datastore, retriever: Any) -> writer.Search:
    """Returns the leave-one-out search of images of the config's source."""
    by_state = isinstance(retriever, HiddenRetriever)
    local = retriever.local if by_state else retriever  # a dense or a ScaNN search, as there is no mesh
    leave_one_out = LeaveOneOut(store, names_in(store), local, config.retrieval.keys)
    name_of, text = names_below(config.source), load_prompts(config.model) if by_state else None

    def search(
        codes: np.ndarray, ids: Sequence[str], captions: Sequence[str], count: Callable[[int], Any]
    ) -> Neighbors:
        states = None
        if text is not None:
            reader = Reader(model, text, prompts_of(text, captions), config.batch_size)
            table = np.asarray(retriever.table)
            parts = [project(table, known.states) for known in reader.read(codes.reshape(len(codes), -1), captions)]
            states = np.concatenate(parts).reshape(-1, table.shape[1])
        return leave_one_out.search(codes, [name_of(id_) for id_ in ids], count, states)

    return search


def _open_search(config: NeighborsConfig) -> writer.Search:
    """Opens the search in a process that did not begin the build."""
    return _search(config, *_opened(config))


def _encoded_again(config: NeighborsConfig, split: str, listing: Path) -> EncodedImages:
    """Opens the images of a split in a process that did not begin the build."""
    tokenizer = load_tokenizer(config.model)
    images = ImageSource(config.source, config.data_dir, True, tokenizer, "begun", listing).images(split)
    return EncodedImages(images, images.source_id, encoder(tokenizer), config.batch_size)


def settings_of(
    config: NeighborsConfig, store: Datastore, tokenizer: ImageTokenizer, split: str, num_images: int
) -> NeighborSettings:
    """Returns the settings of a split's neighbour set."""
    search = config.retrieval
    return NeighborSettings(
        fingerprint=store.settings.fingerprint,
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        k=search.k,
        keys=search.keys,
        search=search.search,
        scann=search.scann,
        storage=search.storage if search.search.endswith("dense") else "",
        datastore=store.shown_fingerprint,
        store_images=store.num_images,
        source=config.source,
        split=split,
        num_images=num_images,
        shard_size=config.shard_size,
        columns=config.columns,
        backbone=backbone_of(tokenizer, search.keys),
        store=search.store,
        command=" ".join(["python -m arrag_jax.build_neighbors", *sys.argv[1:]]),
    )


def _say(found: NeighborSet, start: float) -> None:
    """Prints what a set holds."""
    size = sum(path.stat().st_size for path in found.directory.iterdir())
    wordless = sum(reason == NO_CAPTION for _, reason in found.bad)
    left_out = told_of([found], f"that cannot be read or have no caption ({wordless:,})")
    print(
        f"neighbor set {found.directory} is complete: {len(found):,} images{left_out}, "
        f"{found.k} neighbours per position, {size:,} bytes, {time.perf_counter() - start:.1f} s"
    )
