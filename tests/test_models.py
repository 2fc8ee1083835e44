"""Janus against the reference's numbers; checkpoints there and back; folders that are no checkpoint."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.models.config_json import config_to_json, read_config
from arrag_jax.models.janus import PARTS, VISION
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.models.weights import parameters
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.variables import freeze
from arrag_jax.nn.vq import ResBlock, VQConfig, to_uint8
from helpers import tiny
from helpers.jaxprs import equations


@pytest.fixture(scope="module")
def golden_model(reference):
    return load_model(reference("janus_layout"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right", "nopad"])
def test_teacher_forced_logits(golden_model, reference, side):
    """Padding never changes a result: right-padded prompts must give what the reference gives for left-padded ones."""
    golden = np.load(reference("base.npz"))
    expected = golden["tf_logits_left"][:, -37:-1]
    if side == "nopad":
        for i in (0, 1):
            logits = golden_model.score(golden[f"prompt_{i}"][None], golden["image_ids"][i : i + 1])
            np.testing.assert_allclose(logits[0], expected[i], atol=1e-4)
            if (alone := f"tf_logits_nopad_{i}") in golden:
                np.testing.assert_allclose(logits[0], golden[alone][0, -37:-1], atol=1e-4)
    else:
        ids, mask = golden[f"text_ids_{side}"], golden[f"text_mask_{side}"]
        np.testing.assert_allclose(golden_model.score(ids, golden["image_ids"], prompt_mask=mask), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["sq", "nonsq"])
def test_tokenizer_latents_codes_and_pixels(golden_model, reference, shape):
    golden = np.load(reference("vq.npz", whole=shape == "sq"))
    codes, latents = golden_model.encode_images(golden[f"{shape}_images"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(codes, golden[f"{shape}_codes"])
    np.testing.assert_allclose(latents, golden[f"{shape}_z_normed_bhwc"], atol=1e-5)
    pixels = golden_model.decode_codes(codes, *latents.shape[1:3])
    expected = golden[f"{shape}_decoded_from_codes"].transpose(0, 2, 3, 1)  # the first rows, or all
    np.testing.assert_allclose(pixels[:, : expected.shape[1]], expected.clip(-1, 1), atol=1e-4)
    np.testing.assert_allclose(golden_model.codebook, golden["codebook_normalised"], atol=1e-6)


@pytest.mark.slow
def test_an_abstract_model_is_that_of_eval_shape(monkeypatch):
    """Same graph and shapes, traced once; what one caller does to its model the next one's does not show."""
    expected = nnx.split(nnx.eval_shape(lambda: tiny.Janus(tiny.CONFIG, nnx.Rngs(0))))
    first = abstract(tiny.Janus, config=tiny.CONFIG)
    monkeypatch.setattr(nnx, "eval_shape", None)
    tiny.fill(first, 0)
    freeze(first)
    assert nnx.split(abstract(tiny.Janus, config=tiny.CONFIG)) == expected


def test_norms_do_not_cancel():
    """A GroupNorm takes no notice of what its input stands on: here 1000, whose float32 are 6e-5 apart."""
    block = abstract(ResBlock, inputs=32, outputs=32, config=VQConfig())
    tiny.fill(block, 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 32)), jnp.float32)
    np.testing.assert_allclose(block.norm1(x + 1000), block.norm1(x), atol=1e-3)


def test_uint8_truncates():
    np.testing.assert_array_equal(to_uint8(jnp.array([-2.0, -1.0, 0.999, 1.0, 3.0])), [0, 0, 254, 255, 255])


@pytest.mark.slow
@pytest.mark.parametrize(("load", "parts"), [(load_model, PARTS), (load_tokenizer, VISION)])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, load, parts):
    """Also where heads are wider than usual, and the tokenizer's decoder is another than its encoder."""
    language = dataclasses.replace(tiny.CONFIG.language, head_dim=6)
    vision = dataclasses.replace(tiny.CONFIG.vision, decoder_multipliers=(2, 3))
    model = tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language, vision=vision))
    save_model(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert again.decode_codes(np.zeros((1, 6), int), 2, 3).shape == (1, 4, 6, 3)
    before, after = parameters(model), parameters(again)
    assert set(after) == {name for name in before if name.startswith(tuple(f"{p}." for p in parts))}
    for name, value in after.items():
        np.testing.assert_array_equal(value[...], before[name][...])
    assert again.fingerprint == model.fingerprint


def test_a_bfloat16_save_keeps_the_tokenizer_exact(tmp_path):
    model = tiny.janus()
    save_model(model, tmp_path, "bfloat16")
    again = load_model(tmp_path)
    assert again.fingerprint == model.fingerprint
    weight = model.gen_head.layers[0].weight[...]
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(again.gen_head.layers[0].weight[...], rounded)


def test_fingerprints_tell_tokenizers_apart_and_nothing_else():
    one, other = tiny.janus(), tiny.janus()
    other.gen_head.layers[0].weight[...] += 1.0
    assert one.fingerprint == other.fingerprint
    other.gen_vision_model.codes[...] += 1e-3
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_configs_survive_their_published_form(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(PRESETS[name])))
    assert read_config(tmp_path) == PRESETS[name]


def damaged(folder, how):
    """Breaks a saved checkpoint in one way."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "removed":
        del tensors["gen_embed.weight"]
    elif how == "added":
        tensors["gen_embed.bias"] = np.zeros(3, np.float32)
    elif how == "transposed":
        tensors["gen_embed.weight"] = np.ascontiguousarray(tensors["gen_embed.weight"].T)
    save_file(tensors, path)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    if how == "another model":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    if how == "no json":
        (folder / "config.json").write_text("{")
    if how == "no weights":
        path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("removed", r"missing gen_embed\.weight"),
        ("added", r"unknown gen_embed\.bias"),
        ("transposed", r"gen_embed\.weight has shape \(8, 9\), its config asks for \(9, 8\)"),
        ("cut short", r"model\.safetensors is not a whole safetensors file"),
        ("another model", r"config of another model \(model_type 'bert'\)"),
        ("no json", r"config\.json is not JSON"),
        ("no weights", r"holds no model\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, how, message):
    save_model(tiny.janus(), tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    """However much of one kind there is."""
    save_model(tiny.janus(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [key for key in tensors if ".layers." in key and key.startswith("language_model")]
    assert len(gone) > 12
    kept = {key: value for key, value in tensors.items() if key not in gone}
    kept |= {"gen_embed.weight": np.zeros((7, 8), np.float32), "gen_embed.bias": np.zeros(3, np.float32)}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    wrong = [*(f"missing {key}" for key in sorted(gone)), "unknown gen_embed.bias"]
    wrong.append("gen_embed.weight has shape (7, 8), its config asks for (9, 8)")
    assert str(error.value).split("\n  ") == [f"{tmp_path} does not hold the model of its config.json:", *wrong]


def test_an_index_must_be_that_of_its_files(tmp_path):
    save_model(tiny.janus(), tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "a.safetensors")}))
    assert load_model(tmp_path).fingerprint == tiny.janus().fingerprint
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(keys, "a.safetensors"), "x": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"b\.safetensors is named by its index but is not there"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys.keys() - {"gen_embed.weight"}, "a.safetensors")}))
    with pytest.raises(UserError, match=r"index\.json omits tensors that its files hold: gen_embed\.weight;"):
        load_model(tmp_path)
    save_file({"gen_embed.weight": keys["gen_embed.weight"], "x": np.zeros(1)}, tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(keys, "a.safetensors"), "x": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"holds gen_embed\.weight twice, in a\.safetensors and b\.safetensors"):
        load_model(tmp_path)


def test_images_that_do_not_fit_the_cells_are_refused():
    with pytest.raises(UserError, match="multiples of 2"):
        tiny.janus().encode_images(np.zeros((1, 5, 4, 3), np.float32))


@pytest.mark.slow
def test_grouped_query_attention_equals_repeated_heads():
    """Two key heads shared by four query heads are four key heads that are copies of two."""
    grouped = tiny.janus()
    language = dataclasses.replace(tiny.CONFIG.language, kv_heads=4)
    full = tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language))
    state = {name: value[...] for name, value in parameters(grouped).items()}
    for name, value in parameters(full).items():
        given = state[name]
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            given = jnp.repeat(given.reshape(2, 4, 16), 2, axis=0).reshape(16, 16)
        value.set_value(given)
    ids, mask = tiny.prompts((4, 3))
    codes = np.random.default_rng(0).integers(0, 9, (2, 20))
    ours, theirs = (model.score(ids, codes, prompt_mask=mask) for model in (grouped, full))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


class TestPrompts:
    """The chat form and its errors."""

    text = PromptTokenizer.of_words(["a cat", "two dogs"])

    def test_the_chat_form_in_a_padded_batch(self):
        ids, mask = self.text(["a cat", "two dogs a cat"])
        words = [[self.text.tokenizer.id_to_token(int(i)) for i in row] for row in ids]
        assert words[0][2:] == [
            "<｜begin▁of▁sentence｜>", "<|User|>", ":", "a", "cat", "<|Assistant|>", ":", "<begin_of_image>",
        ]  # fmt: skip
        assert mask.sum(1).tolist() == [8, 10] and not mask[0, :2].any()

    def test_the_first_token_stands_there_once_whoever_puts_it(self):
        """A published tokenizer.json may leave it to the code around it."""
        bare = Tokenizer.from_str(self.text.tokenizer.to_str())
        bare.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        for given, expected in zip(PromptTokenizer(bare)(["a cat"]), self.text(["a cat"]), strict=True):
            np.testing.assert_array_equal(given, expected)

    def test_a_batch_of_lengths_is_each_alone(self):
        """Through the model, pads and all."""
        model, texts = tiny.janus(), ["a cat", "two dogs a cat", "cat"]
        codes = np.random.default_rng(0).integers(0, 9, (3, 20))
        ids, mask = self.text(texts)
        assert self.text.vocab_size <= tiny.CONFIG.language.vocab_size
        together = model.score(ids, codes, prompt_mask=mask)
        for i, text in enumerate(texts):
            alone = model.score(self.text([text])[0], codes[i : i + 1])
            np.testing.assert_allclose(together[i], alone[0], atol=1e-5)

    def test_saved_and_loaded_reads_alike(self, tmp_path):
        self.text.save(tmp_path)
        again = PromptTokenizer.load(tmp_path)
        np.testing.assert_array_equal(again(["two dogs"])[0], self.text(["two dogs"])[0])
        assert again.pad_id == self.text.pad_id

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "empty"),
            ("  ", "empty"),
            ("a zebra", "does not know 'zebra'; it knows: a cat dogs two"),
            ("<|User|> a cat", "a prompt holds '<|User|>', a special token of the model"),
            ("a cat<begin_of_image>", "a prompt holds '<begin_of_image>', a special token of the model"),
        ],
    )
    def test_prompts_that_cannot_be_read(self, prompt, message):
        with pytest.raises(UserError, match=re.escape(message)):
            self.text([prompt])

    def test_too_long(self):
        with pytest.raises(UserError, match="prompt too long: 12 tokens, at most 9"):
            self.text(["a cat a cat a cat"], length=9)

    def test_a_folder_may_say_how_long(self, tmp_path):
        """In all positions, of which the picture takes its cells; it outlasts being read and written."""
        height, width = tiny.CONFIG.grid
        for said, limit in ((8 + height * width, 8), (None, 512)):
            config = dataclasses.replace(tiny.CONFIG, max_positions=said)
            save_model(tiny.janus(config=config), tmp_path)
            save_model(load_model(tmp_path), tmp_path)
            self.text.save(tmp_path)
            text = PromptTokenizer.load(tmp_path)
            assert text(["a cat"])[1].sum() == 8
            with pytest.raises(UserError, match=f"prompt too long: {6 + limit} tokens, at most {limit}"):
                text(["cat " * limit])

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match=r"tokenizer\.json is not there"):
            PromptTokenizer.load(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="cannot be read as a tokenizer"):
            PromptTokenizer.load(tmp_path)


def test_the_unconditional_prompt_keeps_its_ends():
    model = tiny.janus()
    ids, mask = tiny.prompts((3, 5))
    empty, kept = model.unconditional(model.check_condition(ids, mask))
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(empty, [[1, 1, ids[0, 2], 1, ids[0, 4]], [ids[1, 0], 1, 1, 1, ids[1, 4]]])


def operands(jaxpr) -> set[str]:
    """Types of what is multiplied in products, also in the bodies of loops and calls."""
    names = ("dot_general", "conv_general_dilated")
    products = [equation for equation in equations(jaxpr) if equation.primitive.name in names]
    return {str(operand.aval.dtype) for equation in products for operand in equation.invars}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["score", "gradients", "draw"])
def test_all_products_are_of_the_models_type(dtype, task):
    """From the first embedding on: one number of a wider type, and everything after it is computed in that."""
    model = tiny.janus(config=dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=1, neighbors=3)))
    model = model.fused() if task == "draw" else model
    graph, tokenizer, weights = nnx.split(model, lambda path, _: "gen_vision_model" in path, ...)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    ids, codes = jnp.ones((2, 3), jnp.int32), jnp.zeros((2, 20), jnp.int32)

    def run(weights):
        held = nnx.merge(graph, tokenizer, weights)
        if task != "draw":
            return held.teacher_forced((ids, ids > 0), codes, jnp.zeros((2, 20, 3), jnp.int32)).sum()
        hidden, cache = held.prefill((ids, ids > 0), 2)
        hidden, cache = held.step(hidden, cache, jnp.int32(0), held.retrieved_features(jnp.zeros((2, 3), jnp.int32)))
        return held.step(held.embed_codes(codes[:, 0]), cache, jnp.int32(1), None)

    assert operands(jax.make_jaxpr(jax.grad(run) if task == "gradients" else run)(weights).jaxpr) == {dtype}
