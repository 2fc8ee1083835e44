"""Looks up the neighbours of training and validation images, which FAiD is trained on.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
python -m arrag_jax.build_neighbors --config configs/janus_pro_1b_neighbors.py --config.source=pairs --workdir runs/own

Images come from whatever ``build_datastore`` takes, with captions; a folder is listed once, when the sets are begun.
Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import NeighborsConfig
from arrag_jax.data import sources
from arrag_jax.files import require_within
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.leave_one_out import LeaveOneOut
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store import neighbor_writer
from arrag_jax.store.building import require_same_settings, state_of
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import LISTING, ImageSource, encoder, names_below, names_in, origin_of, told_of
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings
from arrag_jax.store.neighbor_writer import NO_CAPTION


def run(config: NeighborsConfig, workdir: str) -> None:
    """Looks up the neighbours of two splits, in --workdir/train and --workdir/valid; run again to continue."""
    start, tokenizer = time.perf_counter(), load_tokenizer(config.model)
    store, retriever = load_retriever(config.retrieval, tokenizer.fingerprint)
    splits = {"train": config.train_split, "valid": config.valid_split}
    splits = {require_within(Path(workdir), Path(workdir) / name): split for name, split in splits.items()}
    there = {directory: state_of(NeighborSet, directory) for directory in splits}
    states = {state for state, _ in there.values()}
    state = states.pop() if len(states) == 1 else "begun"
    spelt = sources.spelt_alike(config.source, [settings.source for _, settings in there.values() if settings])
    config = dataclasses.replace(config, source=spelt)
    source = ImageSource(config.source, config.data_dir, True, tokenizer, state, Path(workdir) / LISTING)
    jobs = {}
    for directory, split in splits.items():
        images = source.images(split)
        number = there[directory][1].num_images if state == "whole" else len(images)
        settings = settings_of(config, store, tokenizer, split, number)
        jobs[directory] = images, dataclasses.replace(settings, origin=origin_of(config.source), beside=source.beside)
    for directory, (_, settings) in jobs.items():
        require_same_settings(NeighborSet, directory, settings)  # of both, before the first is begun
    source.keep_listing()
    encode, name_of = encoder(tokenizer), names_below(config.source)
    others = LeaveOneOut(store, names_in(store), retriever)

    def search(codes: np.ndarray, ids: Sequence[str], count: Callable[[int], Any]) -> Neighbors:
        return others.search(codes, [name_of(id_) for id_ in ids], count)

    for directory, (images, settings) in jobs.items():
        found = neighbor_writer.build(
            directory,
            images,
            encode,
            search,
            settings,
            config.batch_size,
            images.source_id,
            config.max_bad_fraction,
            config.min_bad,
        )
        tell(found, start)
    (Path(workdir) / LISTING).unlink(missing_ok=True)


def settings_of(
    config: NeighborsConfig, store: Datastore, tokenizer: ImageTokenizer, split: str, num_images: int
) -> NeighborSettings:
    """What the set of a split is to hold."""
    search = config.retrieval
    return NeighborSettings(
        fingerprint=store.settings.fingerprint,
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        k=search.k,
        keys=search.keys,
        search=search.search,
        scann=search.scann,
        storage=search.storage if search.search == "dense" else "",
        datastore=store.store_fingerprint,
        store_images=store.num_images,
        source=config.source,
        split=split,
        num_images=num_images,
        shard_size=config.shard_size,
        store=search.store,
        command=" ".join(["python -m arrag_jax.build_neighbors", *sys.argv[1:]]),
    )


def tell(found: NeighborSet, start: float) -> None:
    """Says what a set holds."""
    size = sum(path.stat().st_size for path in found.directory.iterdir())
    wordless = sum(reason == NO_CAPTION for _, reason in found.bad)
    told = told_of([found], f"that cannot be read or have no caption ({wordless:,})")
    print(
        f"neighbor set {found.directory} is complete: {len(found):,} images{told}, {found.k} neighbours a cell, "
        f"{size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main_with_config(run, NeighborsConfig, workdir=Flag("folder of both sets; made when absent", path=True))
