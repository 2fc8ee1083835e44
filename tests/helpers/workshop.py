"""A tiny base, its store and its neighbour sets, for tests of FAiD's training. Run as a script it trains there."""

import dataclasses
import sys
from pathlib import Path

from arrag_jax import build_datastore, build_neighbors
from arrag_jax.config import DatastoreConfig, NeighborsConfig, OptimizerConfig, RetrievalConfig, TrainConfig
from arrag_jax.data.emoji.scenes import words
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import PromptTokenizer
from helpers import tiny

SOURCE = "emoji_scenes/tiny"
STORED, K = 6, 3  # neighbours a cell in the sets, and in the blenders
# Elements above which a leaf is spread over devices where tests say so: the blenders' convolutions have no fewer.
SPREAD = 4 * tiny.CONFIG.language.width**2
# Paths of leaves in the state of its training: these convolutions, and what AdamW keeps of them.
BLENDER_KERNELS = {
    f"{part}/language_model/layers/{layer}/blender/conv{hop}/kernel"
    for part in ("params", "optimizer/1/0/mu", "optimizer/1/0/nu")
    for layer in range(tiny.CONFIG.language.layers)
    for hop in (1, 12, 2, 22)
}


def build(folder: Path) -> None:
    """Everything under ``folder``: model, data, store, neighbors."""
    text = PromptTokenizer.of_words(words())
    config = dataclasses.replace(
        tiny.CONFIG,
        grid=(12, 12),
        pad_id=text.pad_id,
        language=dataclasses.replace(tiny.CONFIG.language, vocab_size=text.vocab_size),
        vision=dataclasses.replace(tiny.CONFIG.vision, multipliers=(1, 1, 1), codebook_size=16),
    )
    model, data, store = (str(folder / name) for name in ("model", "data", "store"))
    save_model(tiny.janus(config=config), model)
    text.save(model)
    build_datastore.run(DatastoreConfig(model, SOURCE, "store", data, num_images=24, indexes=()), workdir=store)
    retrieval = RetrievalConfig(store, STORED, search="dense")
    sets = NeighborsConfig(model, retrieval, "train", "valid[:16]", SOURCE, data)
    build_neighbors.run(sets, workdir=str(folder / "neighbors"))


def config(folder: Path, options: dict | None = None, **changes) -> TrainConfig:
    """A short FAiD training there."""
    options = {
        "base": str(folder / "model"),
        "neighbors": str(folder / "neighbors"),
        "retrieval": {"store": str(folder / "store"), "k": STORED, "search": "dense"},
        "faid": {"stride": 1, "hops": (1, 2), "neighbors": K},
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
        "prompt_length": 16,
        **(options or {}),
    }
    base = {
        "task": "faid", "steps": 4, "batch_size": 8, "options": options, "log_every": 1, "eval_every": 4,
        "checkpoint_every": 4, "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    }  # fmt: skip
    return TrainConfig(**base | changes)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
