"""LlamaGen's golden numbers, and the laws of the decode loop with it: both families, plain, DAiD and FAiD."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid
from arrag_jax.errors import UserError
from arrag_jax.interfaces import ImageModel, TunableModel
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.llamagen_files import LAYOUT
from arrag_jax.models.weights import parameters
from arrag_jax.nn.layer import Layer
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.rotary import turn_by_grid
from arrag_jax.ops import grid
from arrag_jax.ops.sampling import guide
from helpers import llamagens, tiny

FILES = {
    "c2i_a": ("c2i_a.pt", "vq16.pt"),
    "c2i_b": ("c2i_b_fsdp.pt", "vq8_g32.safetensors"),
    "t2i": ("t2i.safetensors", ""),
    "t2i_120": ("t2i_120.safetensors", ""),
}
GUIDANCE = {"c2i_a": "cfg_a", "c2i_b": "cfg_b", "t2i": "cfg_t", "t2i_120": "cfg_120"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives a golden model by its name, as it is published."""
    path = tmp_path_factory.mktemp("llamagen")
    return functools.cache(lambda name: load_model(llamagens.folder(path / name, name, *FILES[name])))


def close(ours, golden, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), golden, atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c2i_a", "c2i_b"])
def test_classes_score_as_the_reference(models, name):
    model, golden = models(name), llamagens.arrays(name)
    close(model.score(golden["labels"], golden["codes"]), golden["tf_logits"])
    none = model.unconditional(model.check_condition(golden["labels"]))
    close(model.score(none, golden["codes"]), golden["tf_uncond_logits"])


@pytest.mark.slow
def test_captions_score_as_the_reference(models):
    model, golden = models("t2i"), llamagens.arrays("t2i")
    features, mask, codes = (golden[key] for key in ("c_indices", "c_emb_masks", "codes"))
    first = features.shape[1] - 1
    close(model.score((features, mask), codes), golden["tf_logits"][:, first:])
    close(model.score(features, codes, prompt_mask=mask), golden["tf_logits"][:, first:])
    close(model.score(features[:2], codes[:2]), golden["tf_nomask_logits"])
    none = model.unconditional(model.check_condition(features, mask))
    close(model.score(none, codes), golden["tf_uncond_logits"])
    close(model.cls_embedding(jnp.asarray(features)), golden["cap_cond"])
    close(model.cls_embedding(none[0][:1])[0], golden["cap_uncond"])


def states_on_the_right(golden) -> np.ndarray:
    """What the text encoder made of captions, [B, 120, C], padded on the left by zeros."""
    rows = zip(golden["t5_last_hidden_state"], golden["t5_attention_mask"].sum(1), strict=True)
    return np.stack([np.concatenate([0 * states[count:], states[:count]]) for states, count in rows])


@pytest.mark.slow
def test_captions_of_120_tokens_score_as_the_reference(models):
    model, golden = models("t2i_120"), llamagens.arrays("t2i_120")
    close(model.score((states_on_the_right(golden), golden["c_emb_masks"]), golden["codes"]), golden["tf_logits"])


@pytest.mark.slow
def test_hidden_states_are_the_references(models, monkeypatch):
    golden, hidden, feed_forward = llamagens.arrays("c2i_a"), [], Layer.feed_forward

    def kept(self: Layer, x: jax.Array) -> jax.Array:
        states = feed_forward(self, x)
        jax.debug.callback(lambda value: hidden.append(np.asarray(value)), states, ordered=True)  # in a scan
        return states

    monkeypatch.setattr(Layer, "feed_forward", kept)
    models("c2i_a").teacher_forced(*(jnp.asarray(golden[key]) for key in ("labels", "codes")))
    jax.effects_barrier()
    assert len(hidden) == 3
    for i, states in enumerate(hidden):
        close(states, golden[f"tf_hidden_{i}"])


@pytest.mark.slow
def test_condition_tokens_have_no_angle(models):
    golden = llamagens.arrays("t2i")["freqs_cis"]
    positions = jnp.concatenate([jnp.full(10, -1), jnp.arange(36)])[None]
    turn = turn_by_grid(positions, 6, models("t2i").config.language.head_width, 10000.0)
    close(jnp.stack(turn, axis=-1)[0], golden, 1e-6)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_the_references(tmp_path):
    golden = llamagens.arrays("c2i_a")
    model = load_model(llamagens.folder(tmp_path, "c2i_a", "c2i_a.safetensors"), "bfloat16")
    away = np.abs(np.asarray(model.score(golden["labels"], golden["codes"])) - golden["tf_logits"])
    assert away.max() < 2 * np.abs(golden["tf_logits_bf16"] - golden["tf_logits"]).max()


def conditions(name: str, golden: dict[str, np.ndarray], run: str):
    """What a golden run drew under: condition and mask."""
    if name == "t2i_120":
        return states_on_the_right(golden), golden["c_emb_masks"]
    if name.startswith("c2i"):
        return golden["labels"], None
    if run == "gen_right":
        return golden["caption_embs"] * golden["emb_masks"][..., None], golden["emb_masks"]
    return golden["c_indices"], None if run == "gen_nomask" else golden["c_emb_masks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "run"),
    [
        *((name, run) for name in ("c2i_a", "c2i_b") for run in ("gen_cfg", "gen_nocfg")),
        *(("t2i", run) for run in ("gen_left", "gen_nocfg", "gen_right", "gen_nomask")),
        ("t2i_120", "gen_left"),
        *((name, "gen_int") for name in ("c2i_a", "c2i_b", "t2i")),
    ],
)
def test_greedy_draws_are_the_references(models, name, run):
    """Tokens; and of the guided runs with both rows kept, the logits of each step."""
    model, golden = models(name), llamagens.arrays(name)
    condition, mask = conditions(name, golden, run)
    scales = llamagens.golden()["cfg_scales"]
    scale = None if run == "gen_nocfg" else scales[GUIDANCE[name]]
    interval = scales[GUIDANCE[name].replace("cfg", "int")] if run == "gen_int" else -1
    tokens, logits = golden[f"{run}_tokens"], golden.get(f"{run}_logits")  # no logits of t2i's interval
    rows = len(tokens)
    condition, mask = condition[:rows], None if mask is None else mask[:rows]
    drawn = sample(model, condition, cfg_scale=scale, cfg_interval=interval, greedy=True, prompt_mask=mask)
    np.testing.assert_array_equal(drawn.codes, tokens)
    if logits is None:
        return
    cond = model.check_condition(condition, mask)
    both = model.score(cond, tokens)
    if scale is not None:
        both = jnp.concatenate([both, model.score(model.unconditional(cond), tokens)])
    positions = jnp.tile(jnp.arange(tokens.shape[1]), rows)
    guided = guide(both.reshape(-1, both.shape[-1]), scale, interval, positions)
    close(guided.reshape(logits.shape), logits, 2e-4)  # guidance adds roundings


@pytest.mark.slow
def test_a_drawn_image_is_the_references(models):
    model, golden = models("c2i_a"), llamagens.arrays("c2i_a")
    pixels = np.asarray(model.decode_codes(golden["gen_cfg_tokens"][:1], 6, 6))
    ours = np.trunc(np.clip(127.5 * pixels + 128, 0, 255)).astype(int)  # as the official sampler rounds
    away = np.abs(ours - golden["gen_cfg_image_u8"].astype(int))
    assert away.max() <= 1 and (away > 0).mean() < 1e-3


def loss_of(logits, codes):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(codes)[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c2i_a", "t2i"])
def test_losses_and_gradients_are_the_references(models, name):
    model, golden = models(name), llamagens.arrays(name)
    codes = jnp.asarray(golden["codes"])
    if name == "c2i_a":
        condition, wanted = jnp.asarray(golden["labels"]), golden["train_loss"]
        weight = jnp.ones(codes.shape)
        dropped = condition.at[0].set(model.config.classes), golden["train_loss_drop0"]
    else:
        condition, wanted = (
            model.check_condition(golden["c_indices"], golden["c_emb_masks"]),
            golden["train_loss_valid"],
        )
        weight = jnp.broadcast_to(jnp.asarray(golden["valid"], jnp.float32)[:, None], codes.shape)
        none = model.unconditional(condition)[0]
        dropped = (condition[0].at[1].set(none[1]), condition[1]), golden["train_loss_valid_drop1"]
    graph, state, rest = nnx.split(model, nnx.Param, ...)

    def loss(state, condition):
        each = loss_of(nnx.merge(graph, state, rest).teacher_forced(condition, codes), codes)
        return (each * weight).sum() / weight.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state, condition)
    close(value, wanted, 1e-5)
    close(jax.jit(loss)(state, dropped[0]), dropped[1], 1e-5)
    norms = dict(zip(golden["grad_names"].tolist(), golden["grad_l2"].tolist(), strict=True))
    flat = {LAYOUT.key(".".join(map(str, path))): value for path, value in nnx.to_flat_state(gradient)}
    assert norms.keys() <= flat.keys()
    for key, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(flat[key][...]), norm, rtol=1e-3, atol=1e-6, err_msg=key)
        if f"grad::{key}" in golden:
            close(flat[key][...], golden[f"grad::{key}"], 1e-5)


# Laws, with a random model that has blenders.


@pytest.fixture(scope="module", params=["c2i", "t2i"])
def model(request):
    return llamagens.random(request.param)


@pytest.fixture(scope="module")
def retriever(model):
    return tiny.store(model)


@pytest.fixture(scope="module")
def condition(model):
    return llamagens.condition(model.config.family)


def test_it_is_a_model_as_the_rest_knows_them(model):
    assert isinstance(model, ImageModel) and isinstance(model, TunableModel)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, Faid()], ids=["plain", "faid"])
def test_step_by_step_equals_teacher_forcing(model, retriever, condition, policy):
    drawn = sample(model, condition, policy, retriever, cfg_scale=None, seed=3, return_log_probs=True)
    found = None
    if policy is not None:
        positions = grid.context_positions(*model.grid)
        contexts = np.where(positions[None] >= 0, np.asarray(drawn.codes)[:, positions], -1)
        found = retriever.search(jnp.asarray(contexts.reshape(-1, 4), jnp.int32)).code
        found = found.reshape(*contexts.shape[:2], -1)[..., : model.blended_neighbors]
    log_p = jax.nn.log_softmax(model.score(condition, drawn.codes, found))
    np.testing.assert_allclose(drawn.log_probs, log_p, atol=1e-5)


@pytest.mark.slow
def test_weight_zero_draws_plain_to_the_bit(model, retriever, condition):
    plain = sample(model, condition, seed=1)
    daid = sample(model, condition, Daid(0.0, 0.1), retriever, seed=1)
    np.testing.assert_array_equal(plain.codes, daid.codes)
    np.testing.assert_array_equal(plain.log_p, daid.log_p)


@pytest.mark.slow
def test_weight_one_draws_retrieved_codes_only(model, retriever, condition):
    tiny.assert_retrieved(sample(model, condition, Daid(1.0, 0.5), retriever), model, retriever)


def test_another_grid_turns_codes_by_their_own_place(model, condition):
    """Scores of a grid depend on its shape, not only on the number of its codes."""
    codes = np.random.default_rng(0).integers(0, 9, (3, 20)).astype(np.int32)
    own, wide = model.score(condition, codes), model.score(condition, codes, grid=(2, 10))
    assert np.abs(np.asarray(own) - wide).max() > 1e-3
    np.testing.assert_array_equal(wide, model.with_grid((2, 10)).score(condition, codes))


@pytest.mark.slow
def test_padding_on_the_left_is_no_padding():
    model, (features, mask) = llamagens.random("t2i"), llamagens.condition("t2i")
    batch = sample(model, (features, mask), cfg_scale=3.0, seed=np.arange(3))
    for i in range(3):
        alone = sample(model, features[i : i + 1, ~mask[i] < 1], cfg_scale=3.0, seed=np.arange(i, i + 1))
        np.testing.assert_array_equal(batch.codes[i], alone.codes[0])


@pytest.mark.slow
def test_a_merged_lora_changes_nothing_but_the_place(model, condition):
    """Queries, keys and values have one matrix, of which LoRA corrects the first and the last rows."""
    tuned = nnx.clone(model)
    tuned.add_adapters(LoraConfig(rank=2, alpha=4.0), None, nnx.Rngs(0))
    for path, value in parameters(tuned).items():
        if ".b." in path and "_lora" in path:
            value[...] = jnp.asarray(np.random.default_rng(len(path)).normal(size=value.shape), jnp.float32)
    codes = np.zeros((3, 20), np.int32)
    apart = tuned.score(condition, codes)
    tuned.merge_lora()
    np.testing.assert_allclose(apart, tuned.score(condition, codes), atol=1e-4)
    assert np.abs(np.asarray(apart) - model.score(condition, codes)).max() > 1e-2


def test_what_cannot_be_a_condition_is_named():
    c2i, t2i = llamagens.random("c2i"), llamagens.random("t2i")
    features, mask = llamagens.condition("t2i")
    for model, condition, given, words in (
        (c2i, [7], None, r"classes must lie in \[0, 7\)"),
        (c2i, [[1]], None, r"classes must be \[B\]"),
        (c2i, [1.5], None, "classes must be integers"),
        (c2i, [1], [1], "classes take no mask"),
        (t2i, features[0], None, r"must be floats \[B, T, C\]"),
        (t2i, features[..., :3], None, r"\[B, T, 7\] with T from 1 to 8"),
        (t2i, np.zeros((1, 9, 7), np.float32), None, "T from 1 to 8"),
        (t2i, features, mask * 2, "0 and 1 alone"),
        (t2i, features, mask & False, "its mask has no 1"),
        (t2i, features * np.nan, mask, "NaN"),
    ):
        with pytest.raises(UserError, match=words):
            sample(model, condition, prompt_mask=given)
    unguided = nnx.clone(c2i)
    unguided.config = dataclasses.replace(c2i.config, guided=False)
    with pytest.raises(UserError, match="no unconditional class"):
        sample(unguided, [1])
