"""A model that is split over eight devices is never whole on one: from its files to its export."""

import dataclasses
import gc
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax import mesh
from arrag_jax.config import DataConfig, MeshConfig, OptimizerConfig, RetrievalConfig, TrainConfig
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.weights import parameters
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.training import state as training_state
from arrag_jax.training.faid import FaidOptions, FaidStep
from arrag_jax.training.loop import make_train_step, train
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.shared import draw
from helpers import tiny

WAYS = 8
LENGTH, NEIGHBORS = 6, 1  # so that features are smaller than the largest weight
SHAPE = dataclasses.replace(
    tiny.CONFIG,
    language=LlamaConfig(vocab_size=64, width=64, layers=4, heads=4, kv_heads=4, mlp=128),
    vision=dataclasses.replace(tiny.CONFIG.vision, codebook_size=16),
    head_width=64,
)
OPTIONS = dict(
    neighbors="none", retrieval=RetrievalConfig("none", k=NEIGHBORS), faid=FaidConfig(4, (1,), NEIGHBORS),
    lora=LoraConfig(rank=8, alpha=8.0, dropout=0.1), prompt_length=LENGTH,
)  # fmt: skip


def per_device() -> dict[jax.Device, int]:
    """Bytes of all living arrays by device."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        share = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.device_set:
            held[device] += share
    return held


class Watched(FaidStep):
    """FAiD's step on random codes; notes after every stage what the fullest device holds of the run."""

    tokens, vocabulary = 1, {}

    def __init__(self, config, options):
        super().__init__(config, options)
        self.rng, self.held = np.random.default_rng(0), {}
        gc.collect()
        self.before = per_device()

    def note(self, stage):
        gc.collect()
        more = max(held - self.before[device] for device, held in per_device().items())
        self.held[stage] = max(more, self.held.get(stage, 0))

    def load(self, devices):
        model = load_model(self.options.base, self.config.compute_dtype, mesh=devices)
        self.note("load")
        return nnx.split(model)

    def base(self):
        return {}

    def _example(self, _):
        made = {name: self.rng.integers(2, 8, leaf.shape).astype(leaf.dtype) for name, leaf in self.example().items()}
        return made | {"prompt_mask": np.ones(LENGTH, bool)}

    def train_source(self):
        return [self._example(i) for i in range(16)]

    def eval_batches(self, batch_size):
        rows = [self._example(i) for i in range(8)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def sample_callback(self, devices):
        ids = self.rng.integers(2, 8, (3, LENGTH)).astype(np.int32)

        def draw_samples(model):
            self.note("evaluate")
            pixels = draw(model, devices, ids, np.ones_like(ids, bool), seed=0, cfg_scale=None)
            self.note("draw")
            return {"samples": pixels[0]}

        return draw_samples

    def export(self, model, directory, run):
        self.note("export")
        model.merge_lora()
        assert all(isinstance(value[...], np.ndarray) for value in parameters(model).values())
        save_model(model, directory, "bfloat16")
        self.note("exported")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(tiny.janus(config=SHAPE), folder)
    return folder


def config(base, devices, steps=2):
    return TrainConfig(
        task="faid", steps=steps, batch_size=8, options=FaidOptions(base=str(base), **OPTIONS), mesh=devices,
        eval_every=2, checkpoint_every=2, log_every=1, data=DataConfig(), remat="dots",
        optimizer=OptimizerConfig(warmup_steps=1),
    )  # fmt: skip


@pytest.mark.slow
def test_no_device_holds_more_than_its_share_and_a_layer(base, tmp_path, monkeypatch):
    """Of parameters and what the optimizer keeps of them, at every stage, also in a run that continues."""
    monkeypatch.setattr(mesh, "SMALLEST_SHARDED", 2**8)
    split = config(base, MeshConfig(1, WAYS))
    task = Watched(split, split.options)
    devices = mesh.make_mesh(split.mesh)
    optimizer = make_optimizer(split.optimizer, split.steps)
    _, frozen, state = training_state.init_state(task, optimizer, split, devices, task.shapes())
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((frozen, state)))
    layer = sum(
        leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path((frozen, state.params))
        if "['layers'][0]" in jax.tree_util.keystr(path)
    )
    train(split, task, tmp_path / "split")
    assert everything > 3 * layer  # so that the bound says something
    for stage, held in task.held.items():
        assert held <= everything / WAYS + layer, (stage, held, everything / WAYS, layer)
    longer = config(base, MeshConfig(1, WAYS), steps=3)
    again = Watched(longer, longer.options)
    train(longer, again, tmp_path / "split")
    assert max(again.held.values()) <= everything / WAYS + layer


@pytest.mark.slow
def test_a_step_gathers_no_more_than_one_layer_at_once(base, monkeypatch):
    """Layers are stacked inside the program; the stack is never gathered."""
    monkeypatch.setattr(mesh, "SMALLEST_SHARDED", 2**8)
    split = config(base, MeshConfig(1, WAYS))
    step, devices = FaidStep(split, split.options), mesh.make_mesh(split.mesh)
    optimizer = make_optimizer(split.optimizer, split.steps)
    graph, frozen, state = training_state.init_state(step, optimizer, split, devices, step.shapes())
    rows = {name: jax.ShapeDtypeStruct((1, 8, *leaf.shape), leaf.dtype) for name, leaf in step.example().items()}
    with jax.set_mesh(devices):
        text = make_train_step(step, graph, optimizer, split).lower(state, frozen, rows).compile().as_text()
    gathered = [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather\(", text)
    ]
    largest = max(leaf.size for leaf in jax.tree.leaves((frozen, state.params)))
    assert gathered and max(gathered) <= largest
    assert jnp.asarray(largest) < sum(leaf.size for leaf in jax.tree.leaves(frozen)) / 4
