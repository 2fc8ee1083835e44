"""Laws of what is trained: dead codes, the frozen tokenizer, dropped captions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.config import DataConfig, OptimizerConfig, TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.weights import parameters
from arrag_jax.nn.variables import Frozen
from arrag_jax.training.loop import train
from arrag_jax.training.prior import PriorTask
from arrag_jax.training.tasks import make_task
from arrag_jax.training.tokenizer import TokenizerTask, count_codes
from helpers import tiny

PRESET = dataclasses.replace(
    tiny.CONFIG, grid=(12, 12), vision=dataclasses.replace(tiny.CONFIG.vision, multipliers=(1, 1, 1), codebook_size=16)
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A tiny preset, a saved tokenizer of its shape, and a function from a task's name to its config."""
    PRESETS["tiny"] = PRESET
    folder, data = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("data")
    save_model(tiny.janus(config=PRESET, parts=VISION), folder)
    (folder / "manifest.json").write_text(json.dumps({"command": "train it", "sha256": "of this alone"}))

    def config(task: str, **options) -> TrainConfig:
        options = {"preset": "tiny", **options}
        if task == "prior":
            options = {"tokenizer": str(folder), **options}
        return TrainConfig(
            task=task, steps=2, batch_size=8, options=options,
            data=DataConfig("emoji_scenes/tiny", str(data), eval_examples=16),
            optimizer=OptimizerConfig(warmup_steps=1), eval_every=2, checkpoint_every=2,
        )  # fmt: skip

    yield folder, config
    del PRESETS["tiny"]


def batch_of(task) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, next(iter(task.eval_batches(8))))


@pytest.mark.slow
def test_dead_codes_move_to_latents_of_the_batch_and_live_ones_stay(workshop):
    task = make_task(workshop[1]("tokenizer"))
    assert isinstance(task, TokenizerTask)
    model = tiny.janus(config=PRESET, parts=VISION)
    vq, batch = model.gen_vision_model, batch_of(task)
    usage = np.full(16, 1 / 16, np.float32)
    usage[[2, 5]] = 0.0
    count_codes(vq, trained=True)
    vq.usage[...] = jnp.asarray(usage)
    before = np.asarray(vq.codes[...])
    task.loss(model, batch, jax.random.key(0))
    # The running share is a mean of the old share and this batch's.
    codes, latents = vq.encode(batch["image"] / 127.5 - 1.0)
    share = np.bincount(np.asarray(codes).reshape(-1), minlength=16) / codes.size
    np.testing.assert_allclose(vq.usage[...], 0.98 * usage + 0.02 * share, atol=1e-6)
    dead = np.asarray(vq.usage[...]) < 0.02 / 16
    task.after_update(model, jax.random.key(1))
    after, flat = np.asarray(vq.codes[...]), np.asarray(latents).reshape(-1, latents.shape[-1])
    np.testing.assert_array_equal(after[~dead], before[~dead])
    for code in after[dead]:
        assert np.abs(flat - code).max(1).min() < 1e-6


@pytest.mark.slow
@pytest.mark.long
def test_a_trained_codebook_that_is_tuned_further_is_not_replaced(workshop, tmp_path):
    """At a learning rate of 0 nothing but a revival changes codes: it changes random ones, and no trained ones."""
    folder, configs = workshop
    still = OptimizerConfig(learning_rate=0.0, warmup_steps=0)
    config = dataclasses.replace(configs("tokenizer"), optimizer=still, steps=1)
    for start in ("", str(folder)):
        task = make_task(dataclasses.replace(config, init_from=start))
        train(dataclasses.replace(config, init_from=start), task, tmp_path / f"from{bool(start)}")
        before = task.init_model(nnx.Rngs(config.seed)) if not start else load_tokenizer(folder)
        after = load_tokenizer(tmp_path / f"from{bool(start)}" / "export")
        assert np.array_equal(after.vq.codes[...], before.vq.codes[...]) == bool(start)


@pytest.mark.slow
def test_the_decoder_teaches_the_encoder_through_the_rounding(workshop):
    """Without codebook and commitment terms the encoder's gradient can come from the pixels alone."""
    task = make_task(workshop[1]("tokenizer", codebook=0.0, commitment=0.0))
    model, batch = tiny.janus(config=PRESET, parts=VISION), batch_of(task)
    count_codes(model.vq, trained=True)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)  # a merged model then owns its variables
    loss = lambda p, r: task.loss(nnx.merge(graph, p, r), batch, jax.random.key(0))[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params, rest)["gen_vision_model"]
    assert jnp.linalg.norm(grads["encoder"]["conv_in"]["kernel"]) > 0
    assert jnp.linalg.norm(grads["codes"]) == 0


@pytest.mark.slow
def test_training_the_prior_leaves_the_tokenizer_bit_identical(workshop, tmp_path):
    folder, config = workshop
    task = make_task(config("prior"))
    assert isinstance(task, PriorTask)
    model = task.init_model(nnx.Rngs(0))
    np.testing.assert_array_equal(model.gen_embed.embedding[...], model.codebook)
    assert model.config.max_positions == 16 + 144  # prompt and picture
    frozen = nnx.to_flat_state(nnx.state(model.gen_vision_model, nnx.Param))
    assert not len(frozen) and len(nnx.to_flat_state(nnx.state(model.gen_vision_model, Frozen)))
    train(config("prior"), task, tmp_path)
    start, end = load_tokenizer(folder), load_model(tmp_path / "export")
    assert start.fingerprint == end.fingerprint
    trained = parameters(end)["language_model.layers.0.mlp.up.weight"][...]
    initial = parameters(model)["language_model.layers.0.mlp.up.weight"][...]
    assert np.abs(trained - initial).max() > 0
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["tokenizer_fingerprint"] == start.fingerprint
    assert manifest["tokenizer"] == {"command": "train it"}


@pytest.mark.slow
def test_a_dropped_caption_is_never_read(workshop):
    _, config = workshop
    task, kept = make_task(config("prior", caption_dropout=1.0)), make_task(config("prior", caption_dropout=0.0))
    language = dataclasses.replace(PRESET.language, vocab_size=task.text.vocab_size)
    model = tiny.janus(config=dataclasses.replace(PRESET, language=language))
    batch = batch_of(task)
    # Another caption of the same length: every word after the first and before the last token moved on by one.
    inner = batch["prompt_mask"] & jnp.roll(batch["prompt_mask"], 1, axis=1)
    other = jnp.where(inner, jnp.roll(batch["prompt_ids"], 1, axis=0), batch["prompt_ids"])
    other = other.at[:, -1].set(batch["prompt_ids"][:, -1])
    key = jax.random.key(0)
    losses = [[float(t.loss(model, {**batch, "prompt_ids": ids}, key)[0]) for ids in (batch["prompt_ids"], other)]
              for t in (task, kept)]  # fmt: skip
    assert losses[0][0] == pytest.approx(losses[0][1], abs=1e-6)
    assert losses[1][0] != pytest.approx(losses[1][1], abs=1e-4)


def test_a_tokenizer_of_another_shape_is_refused(workshop, tmp_path):
    vision = dataclasses.replace(PRESET.vision, codebook_size=8)
    save_model(tiny.janus(config=dataclasses.replace(PRESET, vision=vision), parts=VISION), tmp_path)
    with pytest.raises(UserError, match="is of another shape than preset tiny"):
        make_task(workshop[1]("prior", tokenizer=str(tmp_path))).init_model(nnx.Rngs(0))


def test_unknown_presets_and_options_are_named(workshop):
    config = workshop[1]("tokenizer", comitment=0.1)
    with pytest.raises(UserError, match=r"config\.options\.comitment \(did you mean 'commitment'\?\)"):
        make_task(config)
    for task in ("tokenizer", "prior"):
        with pytest.raises(UserError, match=r"config\.options: preset='huge' is unknown; choose one of .*janus-emoji"):
            make_task(workshop[1](task, preset="huge"))
