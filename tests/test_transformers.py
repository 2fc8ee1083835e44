"""Against the ``transformers`` library's own Janus, small, with random weights, through the folder that it saves."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, load_tokenizer
from arrag_jax.models.config_json import read_config
from arrag_jax.models.conversion import convert
from arrag_jax.models.weights import parameters

BOS, PAD, IMAGE_START = 1, 0, 3
SIDE, CODES = 4, 24


@pytest.fixture(scope="module")
def theirs():
    """The library's model: grouped queries, wider heads, another RoPE base, an aligner of three layers."""
    # Imported here, so that no other test waits for it. A missing library fails: `make test` installs it.
    import torch
    from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8 * SIDE,
            "patch_size": 8, "num_image_tokens": SIDE * SIDE, "projection_dim": 32,
        },
        vq_config={
            "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 2],
            "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32, "num_hidden_layers": 3,
        },
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0, 0.1 if value.ndim == 1 else value[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                value.add_(1)
        # Its search for the nearest code normalises neither latents nor codebook; with unit rows that is the same.
        book = model.model.vqmodel.quantize.embedding.weight
        book.div_(book.norm(dim=1, keepdim=True))
        model.model.generation_head.vision_head.weight.mul_(4)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=2, do_sample=False, guidance_scale=5.0,
        generation_kwargs={"boi_token_id": IMAGE_START},
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("transformers")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def prompts(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """BOS, words, image-start, padded on the left."""
    rng, width = np.random.default_rng(0), max(lengths)
    ids, mask = np.full((len(lengths), width), PAD), np.zeros((len(lengths), width), int)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = [BOS, *rng.integers(4, 40, length - 2), IMAGE_START]
        mask[row, width - length :] = 1
    return ids, mask


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7)], ids=["unpadded", "left-padded"])
def test_teacher_forced_logits(theirs, model, lengths):
    import torch

    ids, mask = prompts(lengths)
    codes = np.random.default_rng(1).integers(0, CODES, (2, SIDE * SIDE))
    with torch.no_grad():
        images = theirs.prepare_embeddings_for_image_generation(torch.tensor(codes[:, :-1]))
        x = torch.cat([theirs.get_input_embeddings()(torch.tensor(ids)), images], dim=1)
        filled = torch.cat([torch.tensor(mask), torch.ones(images.shape[:2], dtype=torch.long)], dim=1)
        hidden = theirs.model.language_model(inputs_embeds=x, attention_mask=filled).last_hidden_state
        expected = theirs.model.generation_head(hidden[:, -SIDE * SIDE :]).numpy()
    np.testing.assert_allclose(model.score(ids, codes, prompt_mask=mask), expected, atol=1e-4)


@pytest.mark.slow
def test_codes_and_pixels(theirs, model):
    import torch

    images = np.random.default_rng(2).uniform(-1, 1, (2, 2 * SIDE, 2 * SIDE, 3)).astype(np.float32)
    codes, latents = model.encode_images(images)
    with torch.no_grad():
        encoded = theirs.model.vqmodel.encode(torch.tensor(images.transpose(0, 3, 1, 2)))
        pixels = theirs.decode_image_tokens(torch.tensor(np.asarray(codes))).numpy()
    np.testing.assert_array_equal(codes, encoded.image_tokens.numpy().reshape(2, -1))
    np.testing.assert_allclose(model.decode_codes(codes, SIDE, SIDE), pixels.clip(-1, 1), atol=1e-4)
    assert latents.shape == (2, SIDE, SIDE, 8) and len(np.unique(codes)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7)], ids=["unpadded", "left-padded"])
def test_greedy_guided_drawing(theirs, model, lengths):
    import torch

    ids, mask = prompts(lengths)
    expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_mode="image")
    drawn = sample(model, ids, prompt_mask=mask, cfg_scale=5.0, greedy=True)
    np.testing.assert_array_equal(drawn.codes, expected.numpy())


@pytest.mark.slow
def test_converted_it_is_the_same_model(folder, model, tmp_path):
    """In our layout; the understanding tower, which the published layout names otherwise, is left out by name."""
    done = convert(folder, tmp_path / "ours", "ours")
    assert done.dropped and all(key.startswith(("model.vision_model.", "model.aligner.")) for key in done.dropped)
    assert read_config(tmp_path / "ours") == model.config
    again = parameters(load_model(tmp_path / "ours"))
    for path, value in parameters(model).items():
        np.testing.assert_array_equal(again[path][...], value[...], err_msg=path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("removed", r"missing model\.generation_embeddings\.weight"),
        ("added", r"unknown model\.generation_embeddings\.bias"),
        ("transposed", r"generation_embeddings\.weight has shape \(8, 24\), its config asks for \(24, 8\)"),
        ("cut short", r"model\.safetensors is not a whole safetensors file"),
        ("other positions", r"rotary positions 'yarn'"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder, tmp_path, how, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    path, key = broken / "model.safetensors", "model.generation_embeddings.weight"
    tensors = load_file(path)
    if how == "removed":
        del tensors[key]
    elif how == "added":
        tensors[key.replace("weight", "bias")] = np.zeros(3, np.float32)
    elif how == "transposed":
        tensors[key] = np.ascontiguousarray(tensors[key].T)
    save_file(tensors, path, metadata={"format": "pt"})
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    if how == "other positions":
        config = json.loads((broken / "config.json").read_text())
        config["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}
        (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(broken)


def test_the_tokenizer_alone(folder, model):
    alone = load_tokenizer(folder)
    assert alone.language_model is None and alone.fingerprint == model.fingerprint
