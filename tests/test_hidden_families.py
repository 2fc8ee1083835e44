"""Hidden keys of other checkpoints than the embedded one: the published Janus layout, and a LlamaGen of classes."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from arrag_jax.config import DaidConfig as Mixture
from arrag_jax.config import DatastoreConfig, DrawConfig, GateConfig, HiddenConfig, MeshConfig, RetrievalConfig
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.ops.sampling import guide
from arrag_jax.retrieval import build
from helpers import llamagens, published

GATE = GateConfig(("surprise", "prompt_surprise"), (1.0, 1.0), (3.0, 3.0), images=3)
METHODS = ("gated", "gated+caption")
CAPTIONS = {"janus": ["a red car", "two cats", "a red cat"], "llamagen": ["0", "3", "5"]}


@pytest.fixture(scope="module", params=["janus", "llamagen"])
def opened(request, tmp_path_factory):
    """A pipeline of the gated methods over a store of twelve captioned images."""
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    if request.param == "janus":
        published.write_checkpoint(model)
    else:
        save_model(llamagens.random("c2i"), model)
    (folder / "images").mkdir()
    for number in range(12):
        Image.fromarray(render(scene("store", number))).save(folder / "images" / f"{number:02d}.png")
        (folder / "images" / f"{number:02d}.txt").write_text(CAPTIONS[request.param][number % 3])
    config = DatastoreConfig(
        str(model), str(folder / "images"), captions=True, batch_size=4, shard_size=5,
        keys=("codebook", "hidden"), indexes=(), hidden_numbers=8,
    )  # fmt: skip
    build.build(config, folder / "store")
    mixture = Mixture(0.9, 0.5, "sum", GATE)
    hidden = HiddenConfig(k=6, search="dense", images=3, copy_share=0.3, gated=mixture, gated_caption=mixture)
    retrieval = RetrievalConfig(str(folder / "store"), 6)
    draw = DrawConfig(str(model), retrieval, hidden=hidden, methods=METHODS, mesh=MeshConfig(1, 1))
    return open_pipeline(draw), CAPTIONS[request.param]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_step_by_step_equals_teacher_forcing(opened, method):
    """With a gate, and without what would continue a copy."""
    pipe, prompts = opened
    model, policy, retriever = pipe.model, pipe.policy(method, prompts), pipe.retriever_for(method, prompts)
    condition = model.check_condition(pipe.text(prompts))
    drawn = sample(model, condition, policy, retriever, cfg_scale=1.5, seed=np.arange(3), return_log_probs=True)
    codes = jnp.asarray(drawn.codes)
    states = [model.states(rows, codes) for rows in (condition, model.unconditional(condition))]
    logits = jnp.concatenate([model.logits(x).reshape(codes.size, -1) for x in states])
    cells = jnp.arange(codes.shape[1])
    flat = states[0].reshape(codes.size, -1)
    found = retriever.search_states(flat, jnp.repeat(codes, len(cells), 0), jnp.tile(cells, len(codes)))
    expected = policy.log_probs(jax.nn.log_softmax(guide(logits, 1.5)), found, jnp.asarray(True))
    np.testing.assert_allclose(np.exp(drawn.log_probs), np.exp(expected).reshape(drawn.log_probs.shape), atol=2e-4)
    assert 0.05 < np.asarray(drawn.weight).mean() < 0.9 and (np.asarray(found.id) == -1).any()


@pytest.mark.slow
def test_a_closed_gate_draws_what_plain_draws(opened):
    pipe, prompts = opened
    config = pipe.config
    closed = dataclasses.replace(config.hidden.gated, gate=dataclasses.replace(GATE, thresholds=(1000.0, 3.0)))
    config = dataclasses.replace(config, hidden=dataclasses.replace(config.hidden, gated=closed))
    shut = dataclasses.replace(pipe, config=config)
    seeds = np.arange(3)
    plain = next(dataclasses.replace(pipe, methods=("plain",)).draw(prompts, "plain", seeds))
    gated = next(shut.draw(prompts, "gated", seeds))
    np.testing.assert_array_equal(gated.drawn.codes, plain.drawn.codes)
    np.testing.assert_array_equal(gated.drawn.log_p, plain.drawn.log_p)


def test_the_keys_of_another_backbone_are_refused(opened, tmp_path):
    pipe, _ = opened
    other = load_model(pipe.config.model)
    _, parameter = nnx.to_flat_state(nnx.state(other.language_model))[0]
    parameter.set_value(parameter[...] + 1.0)
    save_model(other, tmp_path / "other")
    if (words := Path(pipe.config.model, "tokenizer.json")).exists():
        shutil.copy(words, tmp_path / "other")
    with pytest.raises(UserError, match="hidden"):
        open_pipeline(dataclasses.replace(pipe.config, model=str(tmp_path / "other")))
