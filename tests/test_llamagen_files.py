"""A LlamaGen's folder: read strictly, written, converted there and back, and named where it is bad."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.conversion import convert
from arrag_jax.models.llamagen_config import PRESETS, config_to_json, read_config
from arrag_jax.models.weights import parameters
from helpers import llamagens, running


@pytest.fixture
def torch():
    """Imported here, so that no other test waits for it."""
    return pytest.importorskip("torch")


def equal(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value[...], other[path][...], err_msg=path)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_outlast_being_written(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(PRESETS[name])))
    assert read_config(tmp_path) == PRESETS[name]


def test_presets_are_the_published_sizes():
    hidden = {name.rsplit("-", 1)[1]: shape.language.mlp for name, shape in PRESETS.items() if "c2i" in name}
    assert hidden == {"b": 2048, "l": 2816, "xl": 3584, "xxl": 4096, "3b": 8704}
    assert PRESETS["llamagen-c2i-3b"].language.head_width == 100


@pytest.mark.slow
@pytest.mark.parametrize("family", ["c2i", "t2i"])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, family):
    model = llamagens.random(family)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    equal(loaded, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "tokenizer"),
    [("c2i_a", "c2i_a.pt", "vq16.pt"), ("c2i_b", "c2i_b_fsdp.pt", ""), ("t2i_120", "t2i_120_training.pt", "vq16.pt")],
)
def test_there_and_back_every_tensor_is_byte_equal(torch, tmp_path, name, weights, tokenizer):
    """Of a published .pt with its tokenizer's, whose names all stay."""
    source = llamagens.folder(tmp_path / "source", name, weights, tokenizer)
    convert(source, tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "back", "llamagen")
    back = load_file(tmp_path / "back" / "model.safetensors")
    wanted = load_file(llamagens.path(f"{name}.safetensors"))
    if tokenizer:
        held = torch.load(llamagens.path(tokenizer), weights_only=True)["model"]
        wanted |= {key: value.numpy() for key, value in held.items()}
    assert back.keys() == wanted.keys()  # the counter of used codes, too, which drawing never needs
    for key, value in wanted.items():
        assert back[key].tobytes() == value.tobytes() and back[key].shape == value.shape, key
    equal(load_model(source), load_model(tmp_path / "ours"))


def test_what_serving_code_left_in_the_weights_is_ignored(tmp_path):
    source = llamagens.folder(tmp_path, "c2i_a", "c2i_a.safetensors")
    more = {"freqs_cis": (37, 6, 2), "layers.0.attention.kv_cache.k_cache": (1, 4, 40, 12), "causal_mask": (1, 40, 40)}
    held = load_file(source / "model.safetensors")
    save_file(held | {key: np.ones(shape, np.float32) for key, shape in more.items()}, source / "model.safetensors")
    load_model(source)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", ""])
def test_every_wrapper_of_weights_is_read(torch, tmp_path, key):
    source = llamagens.folder(tmp_path, "c2i_b", "c2i_b.safetensors")
    whole = load_model(source)
    state = {name: torch.tensor(value) for name, value in load_file(source / "model.safetensors").items()}
    torch.save({key: state, "steps": 7} if key else state, source / "c2i_B_256.pt")
    (source / "model.safetensors").unlink()
    equal(load_model(source), whole)


def spoil(torch, folder, how: str) -> None:
    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    held = load_file(weights)
    if how.startswith("{"):
        config |= json.loads(how)
    elif how.startswith("-"):
        del config[how[1:]]
    elif how == "keys":
        held["layers.9.attention.wo.weight"] = held.pop("layers.1.attention.wo.weight")
        held["norm.weight"] = held["norm.weight"][:7]
    elif how == "two":
        for name in ("c2i_B_256.pt", "c2i_B_384.pt"):
            torch.save({"model": {key: torch.tensor(value) for key, value in held.items()}}, folder / name)
        weights.unlink()
    elif how == "code":
        torch.save({"model": {"norm.weight": torch.ones(3)}, "hook": print}, folder / "c2i_B_256.pt")
        weights.unlink()
    elif how == "none":
        weights.unlink()
    if weights.exists():
        save_file(held, weights)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ('{"family": "c2v"}', ["family='c2v'", "c2i, t2i"]),
        ("-family", ["missing key config.json.family"]),
        ("-n_head", ["dim, n_layer", "no n_head"]),
        ('{"n_head": 5}', ["n_head=5", "do not fit"]),
        ('{"n_kv_head": 3}', ["n_kv_head=3", "do not fit"]),
        ('{"n_head": 8, "head_dim": null}', ["6 channels", "multiple of 4"]),
        ('{"ffn_hidden": 145}', ["ffn_hidden=145", "144"]),
        ('{"grid": 7}', ["block_size=36", "grid=7"]),
        ('{"grid": null, "block_size": 35}', ["block_size=35 is no square"]),
        ('{"dim": "48"}', ["dim"]),
        ('{"n_layer": 4000}', ["4000 layers", "more than"]),
        ('{"norm_eps": -1}', ["norm_eps"]),
        ('{"vq": {"downsample": 8}}', ["downsample=8", "makes 16"]),
        ('{"vq": {"groupnorm_groups": 48}}', ["multiples of 48"]),
        ('{"vocab_size": 97}', ["tok_embeddings.weight", "97", "output.weight"]),
        ('{"num_classes": 11}', ["cls_embedding.embedding_table.weight", "12"]),
        ("keys", ["missing layers.1.attention.wo.weight", "unknown layers.9", "norm.weight has shape (7,)"]),
        ("two", ["twice", "c2i_B_256.pt and c2i_B_384.pt"]),
        ("code", ["c2i_B_256.pt", "weights alone"]),
        ("none", ["model.safetensors", ".pt"]),
    ],
)
def test_a_bad_folder_is_named(torch, tmp_path, how, words):
    folder = llamagens.folder(tmp_path / "bad", "c2i_a", "c2i_a.safetensors")
    spoil(torch, folder, how)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert all(word in str(error.value) for word in (*words, "bad")), error.value


def test_a_tokenizer_with_fewer_codes_than_are_drawn_is_refused(tmp_path):
    folder = llamagens.folder(tmp_path, "c2i_b", "c2i_b.safetensors", "vq8.safetensors")
    with pytest.raises(UserError, match="a tokenizer of 96 codes, but the model draws 128"):
        load_model(folder)


@pytest.mark.long
def test_generate_draws_classes_from_a_published_checkpoint(tmp_path, capsys, monkeypatch):
    folder = llamagens.folder(tmp_path / "model", "c2i_a", "c2i_a.pt", "vq16.pt")
    words = ["--config", str(running.ROOT / "configs/llamagen_c2i.py"), f"--config.model={folder}", "--method=plain"]
    done = running.run(
        capsys, monkeypatch, "generate", *words, "--prompt=7", "--prompt=0", f"--workdir={tmp_path / 'out'}"
    )
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("*plain*.png"))) == 2
    done = running.run(capsys, monkeypatch, "generate", *words, "--prompt=a cat", f"--workdir={tmp_path / 'no'}")
    running.assert_one_line(done, "'a cat' is no class", "0 to 9")


@pytest.mark.slow
def test_generate_draws_captions_by_the_text_encoder_beside_the_weights(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    folder = llamagens.folder(tmp_path / "model", "t2i_120", "t2i_120_training.pt", "vq16.pt")
    shutil.copytree(llamagens.path("t5"), folder / "t5")
    words = ["--config", str(running.ROOT / "configs/llamagen_t2i.py"), f"--config.model={folder}", "--method=plain"]
    words += ["--config.sampling.top_k=50", "--config.dtype=float32", f"--workdir={tmp_path / 'out'}"]
    done = running.run(capsys, monkeypatch, "generate", *words, "--prompt=two small dogs")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("*plain*.png"))) == 1
