"""Compares a search that is spread over a Ray cluster with the same search in one process.

python benchmarks/remote.py [--images=64] [--shares=4] [--k=128] [--batch=4] [--calls=300]

Builds a store of scenes whose index has as many shards as there are actors, starts a cluster on this machine, and asks
both searches the same contexts in turn. "above" is the difference of two calls.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from arrag_jax.config import DatastoreConfig, RayConfig, RetrievalConfig
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval.build import build
from arrag_jax.retrieval.index import load_index
from arrag_jax.retrieval.load import spread
from arrag_jax.retrieval.remote import ScannShare
from arrag_jax.retrieval.report import held_out_contexts
from arrag_jax.store.datastore import Datastore

MODEL = "arrag_jax/assets/emoji_janus"
IMAGES = flags.DEFINE_integer("images", 64, "scenes in the store, at most 64")
SHARES = flags.DEFINE_integer("shares", 4, "actors")
K = flags.DEFINE_integer("k", 128, "neighbours")
BATCH = flags.DEFINE_integer("batch", 4, "contexts a call")
CALLS = flags.DEFINE_integer("calls", 300, "timed calls of each search")


def main(_: list[str]) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        data = {"source": "emoji_scenes/tiny", "data_dir": f"{folder}/data", "num_images": IMAGES.value}
        build(DatastoreConfig(MODEL, **data, index_shards=SHARES.value), Path(folder) / "store")
        store, tokenizer = Datastore.open(f"{folder}/store"), load_tokenizer(MODEL)
        config = RetrievalConfig(f"{folder}/store", K.value, "codebook", "ray", ray=RayConfig("local", SHARES.value))
        local = ScannShare(load_index(store, "codebook", K.value, config.scann, SHARES.value))
        remote = spread(config, store, True, tokenizer.fingerprint, "")
        contexts = held_out_contexts(store)
        times: dict[str, list[float]] = {"local": [], "ray": []}
        for number in range(CALLS.value):
            context = contexts[(number * BATCH.value + np.arange(BATCH.value)) % len(contexts)]
            answers = []
            for name, search in (("local", lambda x: local.search(x, K.value)), ("ray", lambda x: remote.search(x, 0))):
                start = time.perf_counter()
                answers.append(search(context))
                times[name].append(1000 * (time.perf_counter() - start))
            assert all(np.array_equal(x, y) for x, y in zip(*answers, strict=True))
        times["above"] = [y - x for x, y in zip(times["local"], times["ray"], strict=True)]
        rows = [[name, *map(float, np.percentile(found, (10, 50, 90)))] for name, found in times.items()]
        print(f"{store.num_patches:,} patches, {SHARES.value} actors, K = {K.value}, batches of {BATCH.value}")
        print(table(["", "10 % of calls", "half of them, ms", "90 %"], rows))


if __name__ == "__main__":
    app.run(main)
