"""Builds a datastore and its indexes.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store

Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do.
"""

import sys
import time
from pathlib import Path

import numpy as np

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DatastoreConfig
from arrag_jax.data.images import encoder, load_images
from arrag_jax.models.checkpoint import fingerprint, load_model
from arrag_jax.models.janus import VISION
from arrag_jax.retrieval import index, writer
from arrag_jax.retrieval.datastore import StoreSettings


def run(config: DatastoreConfig, workdir: str) -> None:
    """Builds the datastore that the config describes, in --workdir; run again to continue."""
    start, directory = time.perf_counter(), Path(workdir)
    tokenizer = load_model(config.model, parts=VISION)
    examples = load_images(config.source, config.split, config.data_dir, tokenizer)
    settings = StoreSettings(
        fingerprint=fingerprint(tokenizer),
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        code_dim=tokenizer.codebook.shape[1],
        keys=config.keys,
        captions=config.captions,
        num_images=config.num_images or len(examples),
        shard_size=config.shard_size,
        source=config.source,
        split=config.split,
        command=" ".join(["python -m arrag_jax.build_datastore", *sys.argv[1:]]),
    )

    codebook = np.asarray(tokenizer.codebook)
    store = writer.build(directory, examples, encoder(tokenizer), codebook, settings, config.batch_size)
    for kind in config.indexes:
        if not index.is_current(store, kind, config.scann, config.index_shards):
            index.build_index(store, kind, config.scann, config.index_shards)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    indexes = f"ScaNN over {', '.join(config.indexes)} keys" if config.indexes else "no index"
    print(
        f"datastore {directory} is complete: {store.num_images:,} images, {store.num_patches:,} patches, {indexes}, "
        f"{size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main_with_config(run, DatastoreConfig, workdir=Flag("folder of the datastore; made when absent"))
