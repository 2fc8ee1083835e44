"""The first two steps of the prior and of FAiD on a fixed tiny model and batch, against the figures once computed."""

import json

import numpy as np
import pytest

from arrag_jax import mesh
from arrag_jax.config import MeshConfig, OptimizerConfig, RetrievalConfig, TrainConfig
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.training.faid import FaidOptions, FaidStep, mark_adapters
from arrag_jax.training.loop import make_train_step
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.prior import PriorOptions, PriorStep
from arrag_jax.training.state import init_state
from helpers import golden, tiny

BATCH = 4


class GivenPrior(PriorStep):
    """The prior's loss for a model that no run made."""

    tokens = 20

    def __init__(self):
        self.options = PriorOptions("janus-emoji", "", caption_dropout=0.25)

    def load(self, mesh):
        return ()

    def init_model(self, rngs, loaded=None):
        return tiny.janus()


class GivenFaid(FaidStep):
    """FAiD's loss for a model that no run made."""

    tokens = 20

    def __init__(self):
        self.options = FaidOptions("", "", RetrievalConfig(""), caption_dropout=0.25)

    def load(self, mesh):
        return ()

    def init_model(self, rngs, loaded=None):
        model = tiny.janus()
        model.add_adapters(LoraConfig(rank=2, alpha=4.0, dropout=0.0), FaidConfig(1, (1, 2), 3), rngs)
        tiny.fill(model, 1)
        mark_adapters(model)
        return model


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask = tiny.prompts((3, 7, 5, 4))
    height, width = tiny.CONFIG.grid
    return {
        "image": rng.integers(0, 256, (BATCH, 2 * height, 2 * width, 3), np.uint8),
        "codes": rng.integers(0, 9, (BATCH, height * width)).astype(np.int32),
        "neighbors": rng.integers(-1, 9, (BATCH, height * width, 3)).astype(np.int32),
        "prompt_ids": ids,
        "prompt_mask": mask,
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", [GivenPrior(), GivenFaid()], ids=["prior", "faid"])
def test_the_first_losses_are_those_once_computed(task):
    """Each before its update: the second shows gradients, clipping and optimizer."""
    name = "prior" if isinstance(task, PriorStep) else "faid"
    recorded = json.loads((golden.HERE / "training.json").read_text())[name]
    given = OptimizerConfig(warmup_steps=0, learning_rate=1e-2)
    config = TrainConfig(name, steps=4, batch_size=BATCH, options={}, mesh=MeshConfig(1, 1), optimizer=given)
    devices, optimizer = mesh.make_mesh(config.mesh), make_optimizer(given, config.steps)
    graph, frozen, state = init_state(task, optimizer, config, devices)
    step, found = make_train_step(task, graph, optimizer, config), {"loss": [], "grad_norm": []}
    for _ in range(2):
        state, metrics = step(state, frozen, mesh.put_batch(batch(), devices))
        for key, values in found.items():
            values.append(float(metrics[key]))
    for key, values in found.items():
        np.testing.assert_allclose(values, recorded[key], rtol=1e-5, err_msg=key)
