"""A small store with hidden keys of the embedded backbone, and searches over it."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from arrag_jax.config import DatastoreConfig, RetrievalConfig
from arrag_jax.retrieval import build
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.datastore import Datastore
from helpers.drawings import MODEL

IMAGES, K = 24, 8


def store_in(folder: Path, data: Path, model) -> Datastore:
    """Builds a store of ``IMAGES`` scenes, whose data set is prepared in ``data``."""
    config = DatastoreConfig(
        MODEL, "emoji_scenes/tiny", data_dir=str(data), num_images=IMAGES, batch_size=8, shard_size=10,
        keys=("codebook", "hidden"), indexes=("codebook", "hidden"), hidden_numbers=32,
    )  # fmt: skip
    build.build(config, folder / "store")
    return dataclasses.replace(Datastore.open(folder / "store"), backbone=model.backbone_fingerprint)


def opened(store, model, search="dense", storage="int8", k=K, mesh=None):
    """The search over its hidden keys."""
    config = RetrievalConfig(str(store.directory), k, "hidden", search, storage)
    return load_retriever(config, model.fingerprint, mesh, backbone=model.backbone_fingerprint)[1]


def search_teacher_forced(retriever, states, codes):
    """Neighbours of every cell of pictures, image by image."""
    cells = jnp.arange(codes.shape[1])
    rows = states.reshape(-1, states.shape[2]), jnp.repeat(codes, len(cells), 0), jnp.tile(cells, len(codes))
    return retriever.search_states(*rows)
