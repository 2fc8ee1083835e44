"""Laws of conversion: there and back to the byte, whole or absent, LoRA merged as the reference merges it."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax import convert as command
from arrag_jax.errors import UserError
from arrag_jax.models import conversion
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.conversion import convert
from arrag_jax.models.tensor_files import read_tensors, stored_tensors
from arrag_jax.models.weights import parameters
from helpers import tiny


def tensors(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of the model files: dtype, shape and bytes."""
    stored = stored_tensors(folder)
    return {key: (stored[key].dtype, stored[key].shape, value.tobytes()) for key, value in read_tensors(stored)}


@pytest.fixture
def saved(tmp_path):
    """A tiny model in bfloat16, its tokenizer in float32, with a text head and a part of an understanding tower."""
    folder = tmp_path / "source"
    save_model(tiny.janus(), folder, "bfloat16")
    held = load_file(folder / "model.safetensors")
    held["language_model.lm_head.weight"] = np.arange(192).reshape(12, 16).astype(jnp.bfloat16)
    held["vision_model.vision_tower.blocks.0.norm1.weight"] = np.arange(4, dtype=np.float16)
    held["gen_vision_model.quantize.codebook_used"] = np.arange(7, dtype=np.float32)
    save_file(held, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    return folder


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    save_model(tiny.janus(), tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted", "ours")
    for folder in ("saved", "converted"):
        modes = {path.stat().st_mode for path in (tmp_path / folder).iterdir()}
        assert len(modes) == 1 and modes == {(tmp_path / "saved" / "config.json").stat().st_mode}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["janus_layout", "faid_layout"])
def test_there_and_back_every_tensor_is_byte_equal(reference, tmp_path, layout):
    """There through the command, as a user runs it."""
    words = ["--source", str(reference(layout)), "--target", str(tmp_path / "ours")]
    subprocess.run([sys.executable, "-m", "arrag_jax.convert", *words], check=True, capture_output=True)
    convert(tmp_path / "ours", tmp_path / "back", "janus")
    assert tensors(tmp_path / "back") == tensors(reference(layout))
    before, after = (parameters(load_model(folder)) for folder in (reference(layout), tmp_path / "ours"))
    for path, value in before.items():
        np.testing.assert_array_equal(after[path][...], value[...], err_msg=path)


def test_what_drawing_never_needs_is_apart_and_comes_back(saved, tmp_path):
    convert(saved, tmp_path / "ours", "ours")
    assert len(load_file(tmp_path / "ours" / conversion.UNUSED)) == 3
    assert (
        tensors(tmp_path / "ours").keys()
        == tensors(saved).keys() - load_file(tmp_path / "ours" / conversion.UNUSED).keys()
    )
    convert(tmp_path / "ours", tmp_path / "back", "janus")
    assert tensors(tmp_path / "back") == tensors(saved)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_many_files_hold_what_one_holds(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD_BYTES", 2000)
    convert(saved, tmp_path / "many", "janus")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert tensors(tmp_path / "many") == tensors(saved)


def test_keys_of_the_sources_config_stay(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["torch_dtype"], config["language_config"]["max_position_embeddings"] = "bfloat16", 16384
    (saved / "config.json").write_text(json.dumps(config))
    convert(saved, tmp_path / "ours", "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config


def test_a_failure_leaves_nothing(saved, tmp_path, monkeypatch):
    """Neither the folder nor its beginnings."""

    def fail(*arguments, **named):
        raise OSError("no space left")

    monkeypatch.setattr(conversion, "write_tensors", fail)
    with pytest.raises(UserError, match=r"cannot write .*ours"):
        convert(saved, tmp_path / "ours", "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_is_said_first(saved, tmp_path):
    with pytest.raises(UserError, match=r"--target=.*source is in use; choose a new folder"):
        convert(saved, saved, "ours")
    with pytest.raises(UserError, match="--to='theirs' is unknown; choose one of ours, janus"):
        convert(saved, tmp_path / "new", "theirs")
    with pytest.raises(UserError, match="is no checkpoint folder"):
        convert(tmp_path / "absent", tmp_path / "new", "ours")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_model_beside_a_folder_of_checkpoints_is_no_training_run(saved, tmp_path):
    (saved / "checkpoints").mkdir()
    command.run(str(saved), str(tmp_path / "copy"), "janus", merge_lora=True, last=False)
    assert tensors(tmp_path / "copy") == tensors(saved)


@pytest.fixture
def adapted(reference, tmp_path):
    """The reference's FAiD model with its LoRA as an adapter beside it."""
    folder = tmp_path / "source"
    shutil.copytree(reference("faid_layout"), folder)
    folder.chmod(0o755)
    held = load_file(reference("lora.safetensors"))
    adapter = {key: value for key, value in held.items() if "::" not in key}
    save_file(adapter, folder / "adapter_model.safetensors")
    golden = np.load(reference("lora.npz"))
    config = {"r": int(golden["r"]), "lora_alpha": float(golden["alpha"]), "lora_dropout": 0.05}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def reference_score(model, reference):
    inputs = np.load(reference("faid.npz"))
    names = ("text_ids_left", "gt_tokens", "retrieved_codes", "text_mask_left")
    return model.score(*(inputs[name] for name in names))


@pytest.mark.slow
def test_merged_lora_is_the_references(adapted, reference, tmp_path):
    convert(adapted, tmp_path / "merged", "janus")
    stored = stored_tensors(tmp_path / "merged")
    merged = dict(read_tensors(stored))
    for key, value in load_file(reference("lora.safetensors")).items():
        if key.startswith("merged::"):
            np.testing.assert_allclose(merged[key.removeprefix("merged::")], value, atol=1e-6)
    assert not [key for key in stored if "lora" in key]
    expected = np.load(reference("lora.npz"))["tf_logits_left"][:, -37:-1]
    np.testing.assert_allclose(reference_score(load_model(tmp_path / "merged"), reference), expected, atol=1e-4)


@pytest.mark.slow
def test_lora_apart_stays_to_the_byte(adapted, reference, tmp_path):
    convert(adapted, tmp_path / "apart", "ours", merge_lora=False)
    again = tensors(tmp_path / "apart")
    for key, value in tensors(adapted).items():
        assert again.get(key, value) == value, key
    assert {key for key in again if "lora" in key} == {key for key in tensors(adapted) if "lora" in key}
    expected = np.load(reference("lora.npz"))["tf_logits_left"][:, -37:-1]
    np.testing.assert_allclose(reference_score(load_model(tmp_path / "apart"), reference), expected, atol=1e-4)
