"""Laws of weights in int8: half a step of error, products with their scales, and what is not done with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.config import DrawConfig, MeshConfig, RetrievalConfig, TrainConfig
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.evaluation.run_record import method_facts, texts_of
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.weights import parameters
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.linear import Int8Linear, Linear, quantized
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.parsing import parse
from arrag_jax.training.faid import mark_adapters
from helpers import tiny
from helpers.drawings import MODEL

FAID = dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=2, hops=(1,), neighbors=6))


def in_int8(model: nnx.Module) -> nnx.Module:
    copy = nnx.merge(*nnx.split(model))
    copy.language_model.hold_in_int8()
    return copy


def rounded(model: nnx.Module) -> nnx.Module:
    """The oracle: the same model in float32 with every quantised weight as what its integers stand for."""
    copy = nnx.merge(*nnx.split(model))
    for layer in copy.language_model.layers:
        for part in (layer.attention, layer.mlp):
            for linear in vars(part).values():
                if isinstance(linear, Linear):
                    held, scale = quantized(np.asarray(linear.weight[...]))
                    linear.weight = nnx.Param(jnp.asarray(held * scale[:, None]))
    return copy


def test_a_number_changes_by_half_a_step_at_most():
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 96)) * 10.0 ** rng.uniform(-20, 20, (64, 1))).astype(np.float32)
    weight[3] = 0
    held, scale = quantized(weight)
    assert held.dtype == np.int8 and held.min() >= -127
    assert (np.abs(held).max(1)[np.arange(64) != 3] == 127).all()  # each output uses its whole range
    step = scale.astype(np.float64)[:, None]
    # The quotient is a float32 up to 127, so that half a step is met up to its rounding.
    assert (np.abs(weight - held * step) <= step * (0.5 + 127 * 2.0**-24)).all()
    np.testing.assert_array_equal(held[3], 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_the_layer_of_its_rounded_weight(dtype):
    layer = Linear(96, 64, nnx.Rngs(0), bias=False)
    x = jax.random.normal(jax.random.key(1), (5, 96)).astype(dtype)
    held, scale = quantized(np.asarray(layer.weight[...]))
    oracle = np.asarray(x, np.float64) @ (held * scale.astype(np.float64)[:, None]).T
    y = Int8Linear(layer)(x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), oracle, atol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "daid", "faid"])
def test_it_scores_and_draws_as_the_model_of_its_rounded_weights(method):
    model = tiny.janus(config=FAID if method == "faid" else tiny.CONFIG)
    policy = {"plain": Plain(), "daid": Daid(0.4, 0.3), "faid": Faid()}[method]
    ids, mask = tiny.prompts((3, 6, 4))
    given = dict(cfg_scale=2.0, prompt_mask=mask, seed=3)
    search = None if method == "plain" else tiny.store(model)
    held = in_int8(model)
    drawn, oracle = (sample(each, ids, policy, search, **given) for each in (held, rounded(model)))
    np.testing.assert_array_equal(drawn.codes, oracle.codes)
    if method != "plain":
        return
    scores = [np.asarray(each.score((ids, mask), drawn.codes)) for each in (held, rounded(model), model)]
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-5)
    # At most a fiftieth of the spread of the logits; and the rounding is there to be seen.
    assert 0 < np.abs(scores[0] - scores[2]).mean() < 0.02 * scores[2].std()


@pytest.mark.slow
def test_a_checkpoint_is_read_into_int8(tmp_path):
    """To the same integers as if it were quantised afterwards, whatever dtype the rest has; a quarter of the bytes."""
    model = tiny.janus(config=FAID)
    save_model(model, tmp_path)
    wanted = parameters(in_int8(model))
    for dtype in ("float32", "bfloat16"):
        read = parameters(load_model(tmp_path, dtype, int8=True))
        assert set(read) == set(wanted)
        for path, value in read.items():
            if path.removesuffix("scale") + "weight" in read or value.dtype == jnp.int8:
                np.testing.assert_array_equal(value[...], wanted[path][...], err_msg=path)
    held = [path for path, value in wanted.items() if value.dtype == jnp.int8]
    assert len(held) == FAID.language.layers * 7
    assert all(path.startswith("language_model.layers.") for path in held)


def test_it_is_neither_trained_nor_saved_nor_merged(tmp_path):
    model = tiny.janus()
    for layer in model.language_model.layers:
        layer.attention.add_lora(LoraConfig(rank=2), nnx.Rngs(0))
    held = in_int8(model)
    for forbidden in (
        lambda: save_model(held, tmp_path / "saved"),
        lambda: mark_adapters(held),
        lambda: held.language_model.layers[0].attention.merge_lora(),
    ):
        with pytest.raises(UserError, match="without int8") as told:
            forbidden()
        assert "\n" not in str(told.value)
    assert not (tmp_path / "saved").exists()
    config = {"task": "prior", "steps": 1, "batch_size": 1, "options": {}, "int8": True}
    with pytest.raises(UserError, match=r"config\.int8") as told:
        parse(TrainConfig, config, "config")
    assert "\n" not in str(told.value)


def test_a_run_says_that_its_weights_are_int8():
    """In its record and in its images; a run without says nothing, as records did before there was a choice."""
    config = DrawConfig(model=MODEL, retrieval=RetrievalConfig(store="none"), mesh=MeshConfig(1, 1))
    plain, held = (open_pipeline(dataclasses.replace(config, int8=int8), ["plain"]) for int8 in (False, True))
    layers = [each.model.language_model.layers[0] for each in (plain, held)]
    assert [layer.mlp.up.weight.dtype for layer in layers] == [jnp.float32, jnp.int8]
    facts = [method_facts(each, "plain") for each in (plain, held)]
    assert facts[1] == facts[0] | {"int8": True} and "int8" not in facts[0]
    texts = [texts_of("a cat", 0, "plain", each) for each in facts]
    assert texts[1] == texts[0] | {"int8": "true"}
