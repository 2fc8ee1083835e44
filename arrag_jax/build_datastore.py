"""Builds a datastore and its indexes.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store

Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DatastoreConfig
from arrag_jax.data.emoji_scenes import load_source
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import fingerprint, load_model
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.nn.vq import from_uint8
from arrag_jax.retrieval import index, writer
from arrag_jax.retrieval.datastore import StoreSettings


class Pictures:
    """The pictures of a source of examples (``writer.Images``)."""

    def __init__(self, examples: Sequence[dict[str, Any]]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.examples[i]["image"]


def run(config: DatastoreConfig, workdir: str) -> None:
    """Builds the datastore that the config describes, in --workdir; run again to continue."""
    start, directory = time.perf_counter(), Path(workdir)
    tokenizer = load_model(config.model, parts=VISION)
    images = Pictures(load_source(config.source, config.split, config.data_dir))
    require_size(images, tokenizer, config)
    settings = StoreSettings(
        fingerprint=fingerprint(tokenizer),
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        code_dim=tokenizer.codebook.shape[1],
        keys=config.keys,
        num_images=config.num_images or len(images),
        shard_size=config.shard_size,
        source=config.source,
        split=config.split,
        command=" ".join(["python -m arrag_jax.build_datastore", *sys.argv[1:]]),
    )

    def encode(batch: np.ndarray) -> tuple[Any, Any]:
        codes, latents = tokenizer.encode_images(from_uint8(batch))
        return codes.reshape(-1, *tokenizer.grid), latents

    store = writer.build(directory, images, encode, np.asarray(tokenizer.codebook), settings, config.batch_size)
    for kind in config.indexes:
        if not index.is_current(store, kind, config.scann, config.index_shards):
            index.build_index(store, kind, config.scann, config.index_shards)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    indexes = f"ScaNN over {', '.join(config.indexes)} keys" if config.indexes else "no index"
    print(
        f"datastore {directory} is complete: {store.num_images:,} images, {store.num_patches:,} patches, {indexes}, "
        f"{size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


def require_size(images: Pictures, tokenizer: Janus, config: DatastoreConfig) -> None:
    """Raises UserError unless the tokenizer's grid covers the source's images exactly."""
    found, wanted = images[0].shape, (*tokenizer.config.image_size, 3)
    if found != wanted:
        raise UserError(f"images of {config.source} are {found}, the tokenizer in {config.model} takes {wanted}")


if __name__ == "__main__":
    main_with_config(run, DatastoreConfig, workdir=Flag("folder of the datastore; made when absent"))
