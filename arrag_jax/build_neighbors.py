"""Looks up the neighbours of training and validation images, which FAiD is trained on.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors

Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do.
"""

import sys
import time
from pathlib import Path

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import NeighborsConfig
from arrag_jax.data.images import encoder, load_images
from arrag_jax.models.checkpoint import fingerprint, load_model
from arrag_jax.models.janus import VISION
from arrag_jax.retrieval import neighbor_writer
from arrag_jax.retrieval.building import require_same_settings
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.retrieval.neighbor_set import NeighborSet, NeighborSettings
from arrag_jax.retrieval.others import OtherImages


def run(config: NeighborsConfig, workdir: str) -> None:
    """Looks up the neighbours of two splits, in --workdir/train and --workdir/valid; run again to continue."""
    start, tokenizer = time.perf_counter(), load_model(config.model, parts=VISION)
    store, retriever = load_retriever(config.retrieval, fingerprint(tokenizer))
    jobs = {}
    for name, split in (("train", config.train_split), ("valid", config.valid_split)):
        directory, examples = Path(workdir) / name, load_images(config.source, split, config.data_dir, tokenizer)
        settings = NeighborSettings(
            fingerprint=store.settings.fingerprint,
            grid=tokenizer.grid,
            codebook_size=tokenizer.codebook_size,
            k=config.retrieval.k,
            keys=config.retrieval.keys,
            search=config.retrieval.search,
            scann=config.retrieval.scann,
            datastore=store.fingerprint,
            store_images=store.num_images,
            source=config.source,
            split=split,
            num_images=len(examples),
            shard_size=config.shard_size,
            store=config.retrieval.store,
            command=" ".join(["python -m arrag_jax.build_neighbors", *sys.argv[1:]]),
        )
        require_same_settings(NeighborSet, directory, settings)  # of both, before the first is begun
        jobs[directory] = examples, settings
    search = OtherImages(store, retriever).search
    for directory, (examples, settings) in jobs.items():
        found = neighbor_writer.build(directory, examples, encoder(tokenizer), search, settings, config.batch_size)
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(
            f"neighbor set {directory} is complete: {len(found):,} images, {found.k} neighbours a cell, "
            f"{size:,} bytes, {time.perf_counter() - start:.1f} s"
        )


if __name__ == "__main__":
    main_with_config(run, NeighborsConfig, workdir=Flag("folder of both sets; made when absent"))
