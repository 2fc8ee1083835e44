"""Folders that hold a model in other ways than one safetensors file: PyTorch's files, adapters; and what it costs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.config_json import config_to_json, parse_config, read_config
from arrag_jax.models.janus import Janus
from arrag_jax.models.layouts import PUBLISHED, to_published
from arrag_jax.models.presets import PRESETS, JanusConfig
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.models.weights import parameters
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.lora import LoraConfig
from helpers import tiny


def assert_same(model, other):
    before, after = parameters(model), parameters(other)
    assert before.keys() == after.keys()
    for path, value in after.items():
        np.testing.assert_array_equal(value[...], before[path][...], err_msg=path)


def as_torch(tensors: dict[str, np.ndarray], dtype: str) -> dict:
    """The tensors as PyTorch's parameters, floats in ``dtype``."""
    import torch  # here, so that no other test waits for it; where it is missing this fails: `make test` installs it

    tensors = {key: torch.tensor(value.astype(np.float32)) for key, value in tensors.items()}
    return {key: torch.nn.Parameter(value.to(getattr(torch, dtype))) for key, value in tensors.items()}


def to_bin(folder: Path, dtype: str) -> None:
    """Turns a folder's weights into one PyTorch file."""
    import torch

    torch.save(as_torch(load_file(folder / "model.safetensors"), dtype), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def bin_folder(tmp_path):
    """A tiny model as two PyTorch files in bfloat16 with an index, as the large Janus-Pro is published."""
    import torch

    save_model(tiny.janus(), tmp_path)
    tensors = as_torch(load_file(tmp_path / "model.safetensors"), "bfloat16")
    (tmp_path / "model.safetensors").unlink()
    places = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        torch.save({key: tensors[key] for key in places if places[key] == name}, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


class TestPyTorchFiles:
    """``.bin``, with PyTorch installed and without."""

    def test_bfloat16_shards_are_the_rounded_model(self, bin_folder):
        loaded = parameters(load_model(bin_folder, "bfloat16"))
        for path, value in parameters(tiny.janus()).items():
            rounded = value[...].astype(jnp.bfloat16)
            np.testing.assert_array_equal(loaded[path][...].astype(jnp.bfloat16), rounded, err_msg=path)

    def test_a_single_file_is_the_model_to_the_bit(self, tmp_path):
        save_model(tiny.janus(), tmp_path)
        to_bin(tmp_path, "float32")
        assert_same(load_model(tmp_path), tiny.janus())

    def test_a_file_cut_short(self, bin_folder):
        path = bin_folder / "pytorch_model-00001-of-00002.bin"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match=r"00001-of-00002\.bin is not a whole PyTorch file"):
            load_model(bin_folder)

    def test_a_file_that_holds_more_than_weights_is_not_run(self, bin_folder):
        import torch

        torch.save({"gen_embed.weight": print}, bin_folder / "pytorch_model-00001-of-00002.bin")
        with pytest.raises(UserError, match="is not a whole PyTorch file of weights alone"):
            load_model(bin_folder)

    def test_without_pytorch_the_mend_is_said(self, bin_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError, match=r"can be read with PyTorch only.*pip install torch"):
            load_model(bin_folder)


class TestConfigs:
    """What configs leave out."""

    def test_janus_pro_7b_as_published_is_the_preset(self, tmp_path):
        """Its language_config gives depth and vocabulary; the rest are the defaults of the library's LlamaConfig."""
        config = config_to_json(PRESETS["janus-pro-7b"])
        config["language_config"] = {"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
        config["gen_vision_config"]["params"] = {"image_token_size": 16384, "n_embed": 8}
        del config["image_grid"]
        assert parse_config(config, tmp_path) == PRESETS["janus-pro-7b"]

    def test_a_training_run_stands_for_its_export(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        for name in ("config.json", "base.json"):
            (tmp_path / name).write_text("{}")
        mend = rf"without an export yet.*python -m arrag_jax\.convert --source {tmp_path} --target DIR"
        for load in (load_model, read_config, PromptTokenizer.load):
            with pytest.raises(UserError, match=mend):
                load(tmp_path)
        save_model(tiny.janus(), tmp_path / "export")
        PromptTokenizer.of_words(["a cat"]).save(tmp_path / "export")
        assert_same(load_model(tmp_path), tiny.janus())
        assert read_config(tmp_path) == tiny.CONFIG
        assert PromptTokenizer.load(tmp_path).pad_id == tiny.CONFIG.pad_id

    @pytest.mark.parametrize(
        ("pad", "generation", "tokens", "expected"),
        [
            (5, {"pad_token_id": 4}, {"<pad>": 3}, 5),
            (-1, {"pad_token_id": 4}, {"<pad>": 3}, 4),
            (None, {"bos_token_id": 0}, {"<pad>": 3, "<｜▁pad▁｜>": 2, "<unk>": 1}, 2),
            (-1, None, {"<unk>": 1, "<|Pad|>": 3}, 3),
            (None, None, {"<unk>": 1, "padding": 3}, 11),  # the last of the vocabulary
        ],
    )
    def test_the_pad_is_found(self, tmp_path, pad, generation, tokens, expected):
        config = config_to_json(tiny.CONFIG)
        config["language_config"]["pad_token_id"] = pad
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        added = [{"content": name, "id": i} for name, i in tokens.items()]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        assert read_config(tmp_path).pad_id == expected

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({}, None),
            ({"num_SmoothPatchBlender": None, "num_hop": None}, None),
            ({"num_SmoothPatchBlender": 3}, FaidConfig(3, (1, 2), 10)),
            ({"num_SmoothPatchBlender": None, "num_hop": [2, 1]}, FaidConfig(12, (1, 2), 10)),
            ({"num_SmoothPatchBlender": 3, "num_hop": 2, "retrieved_key_num": None}, FaidConfig(3, (2,), 10)),
        ],
    )
    def test_blenders_are_recognised(self, tmp_path, keys, expected):
        config = config_to_json(tiny.CONFIG)
        config["language_config"] |= keys
        assert parse_config(config, tmp_path).faid == expected

    @pytest.mark.parametrize(
        ("section", "change", "message"),
        [
            ("gen_aligner_config", {"projector_type": "linear"}, "the aligner 'linear' of codes; only 'mlp_gelu'"),
            ("gen_vision_config", {"decoder_ch_mult": [1]}, r"decoder's levels \(1,\) must be as many as .* \(1, 2\)"),
            ("gen_vision_config", {"decoder_ch_mult": None}, "holds a value of the wrong kind"),
        ],
    )
    def test_parts_of_another_kind_are_refused(self, tmp_path, section, change, message):
        config = config_to_json(tiny.CONFIG)
        config[section]["params"] |= change
        with pytest.raises(UserError, match=message):
            parse_config(config, tmp_path)

    def test_a_pad_outside_the_vocabulary_is_refused(self, tmp_path):
        config = config_to_json(tiny.CONFIG)
        config["language_config"]["pad_token_id"] = 12
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="has a vocabulary of 12, but its pad token is 12"):
            load_model(tmp_path)

    @pytest.mark.parametrize("text", ["[]", '{"language_config": [], "gen_vision_config": {}, "gen_head_config": {}}'])
    def test_json_of_the_wrong_kind(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json holds"):
            read_config(tmp_path)


class TestLora:
    """An adapter in the PEFT library's form, beside the weights."""

    @pytest.fixture(params=["language_model.base_model.model.", "base_model.model."], ids=["whole", "language model"])
    def tuned(self, tmp_path, request):
        """Saved with the model around it, or by ``save_pretrained`` of its language model."""
        model = tiny.janus()
        save_model(model, tmp_path)
        adapter = {}
        for i, layer in enumerate(model.language_model.layers):
            layer.attention.add_lora(LoraConfig(2, 6.0, 0.0), nnx.Rngs(0))
            for name, lora in (("q", layer.attention.q_lora), ("v", layer.attention.v_lora)):
                tiny.fill(lora, i)
                for side in "ab":
                    key = f"{request.param}model.layers.{i}.self_attn.{name}_proj.lora_{side.upper()}"
                    adapter[f"{key}.default.weight"] = np.asarray(getattr(lora, side).weight[...])
        save_file(adapter, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
        return model, tmp_path

    def test_it_is_kept_apart_to_the_bit(self, tuned):
        model, folder = tuned
        assert_same(load_model(folder), model)

    def test_without_its_config_it_is_refused(self, tuned):
        _, folder = tuned
        (folder / "adapter_config.json").unlink()
        with pytest.raises(UserError, match=r"needs an adapter_config\.json beside it"):
            load_model(folder)

    def test_among_the_weights_it_needs_its_config_too(self, tuned):
        model, folder = tuned
        weights = load_file(folder / "model.safetensors") | load_file(folder / "adapter_model.safetensors")
        save_file(weights, folder / "model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        assert_same(load_model(folder), model)
        (folder / "adapter_config.json").unlink()
        with pytest.raises(UserError, match=r"lora_A\.weight[^$]*tensors of a LoRA need an adapter_config\.json"):
            load_model(folder)

    def test_a_model_with_lora_apart_is_not_saved(self, tuned, tmp_path):
        with pytest.raises(UserError, match="LoRA is not merged; merge it"):
            save_model(tuned[0], tmp_path / "new")


# Reads a tiny model first: imports, tracing and JAX's own buffers are then in the memory that is there before.
MEASURE = """
import sys
from pathlib import Path
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.weights import parameters

def kib(field):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))

warm, folder, dtype = sys.argv[1:]
load_model(warm, dtype)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = kib("VmRSS")
model = load_model(folder, dtype)
print((kib("VmHWM") - before) * 1024 / sum(value[...].nbytes for value in parameters(model).values()))
"""


def save_blank(folder: Path, config: JanusConfig) -> None:
    """A checkpoint of zeros in bfloat16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_json(config)))
    model = abstract(Janus, config=config)
    shapes = {path: value.shape for path, value in parameters(model).items()}
    zeros = {PUBLISHED.key(path): to_published(np.zeros(shape, jnp.bfloat16), path) for path, shape in shapes.items()}
    save_file(zeros, folder / "model.safetensors")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_needs_little_more_than_the_model(tmp_path, kind):
    """Peak memory at most 1.3 times the model in its target dtype; 170 million parameters, stored in bfloat16."""
    language = LlamaConfig(vocab_size=20_000, width=1024, layers=9, heads=8, kv_heads=8, mlp=4096)
    warm, folder = tmp_path / "warm", tmp_path / "folder"
    save_blank(warm, tiny.CONFIG)
    save_blank(folder, dataclasses.replace(tiny.CONFIG, language=language, head_width=1024))
    if kind == "bin":
        to_bin(warm, "bfloat16")
        to_bin(folder, "bfloat16")
    for dtype in ("float32", "bfloat16"):
        words = [sys.executable, "-c", MEASURE, str(warm), str(folder), dtype]
        ratio = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert 0.9 < ratio <= 1.3, (dtype, ratio)
