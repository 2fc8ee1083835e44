"""CLIP's towers against those of ``transformers`` at random small sizes, and what its folder must hold."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics import clip_features, cmmd
from arrag_jax.models.clip import ClipTokenizer, clip_pixels, load_clip, read_clip_config, unit_image_features
from arrag_jax.nn.clip import ClipConfig, TowerConfig

# Towers (width, MLP, layers, heads), sides of image and patch, dimension, end of text: B/32, L/14 and another, reduced.
SHAPES = [
    {
        "vision": (32, 64, 2, 4),
        "text": (24, 48, 3, 2),
        "image": 32,
        "patch": 16,
        "dim": 20,
        "eos": 99,
        "act": "quick_gelu",
    },
    {
        "vision": (48, 96, 3, 3),
        "text": (32, 64, 1, 4),
        "image": 42,
        "patch": 14,
        "dim": 32,
        "eos": 2,
        "act": "quick_gelu",
    },
    {"vision": (24, 40, 1, 2), "text": (16, 20, 2, 1), "image": 28, "patch": 7, "dim": 8, "eos": 99, "act": "gelu"},
]


def tower(values: tuple[int, ...], act: str) -> dict:
    width, mlp, layers, heads = values
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "hidden_act": act,
    }  # fmt: skip


def theirs(shape: dict, folder):
    """A random model of transformers, saved in the published layout."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            **tower(shape["text"], shape["act"]), "vocab_size": 100, "max_position_embeddings": 9,
            "eos_token_id": shape["eos"], "bos_token_id": 98, "pad_token_id": 1,
        },
        vision_config={
            **tower(shape["vision"], shape["act"]), "image_size": shape["image"], "patch_size": shape["patch"],
        },
        projection_dim=shape["dim"],
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms and biases matter
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return torch, model


@nnx.jit
def images_of(model, pixels):
    return model.image_features(pixels)


@nnx.jit
def texts_of(model, ids):
    return model.text_features(ids)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=["b32", "l14", "gelu"])
def test_both_towers_are_those_of_transformers(shape, tmp_path):
    torch, model = theirs(shape, tmp_path)
    ours, rng = load_clip(tmp_path), np.random.default_rng(0)
    pixels = rng.normal(size=(3, shape["image"], shape["image"], 3)).astype(np.float32)
    ids = rng.integers(3, 98, (4, 9)).astype(np.int32)
    for row, end in enumerate((8, 3, 1, 5)):
        ids[row, end:] = 99
    with torch.no_grad():
        images = model.get_image_features(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2))
        texts = model.get_text_features(input_ids=torch.from_numpy(ids).long())
    images, texts = (np.asarray(getattr(x, "pooler_output", x)) for x in (images, texts))
    assert np.abs(images_of(ours, pixels) - images).max() < 2e-5 * np.abs(images).max()
    assert np.abs(texts_of(ours, ids) - texts).max() < 2e-5 * np.abs(texts).max()
    assert np.allclose(ours.logit_scale[...], model.logit_scale.item())
    lengths = np.linalg.norm(np.asarray(unit_image_features(ours, pixels)), axis=1)
    assert np.allclose(lengths, 1, atol=1e-6)


@pytest.mark.slow
def test_what_follows_the_end_of_a_text_changes_nothing(tmp_path):
    theirs(SHAPES[0], tmp_path)
    model, ids = load_clip(tmp_path), np.array([[98, 5, 7, 99, 99, 99, 99, 99, 99]], np.int32)
    other = ids.copy()
    other[0, 4:] = [1, 2, 3, 4, 5]
    assert np.array_equal(texts_of(model, ids), texts_of(model, other))


def test_published_shapes_are_read(tmp_path):
    """Keys that are left out have the defaults of B/32; older files repeat their sections, and those come first."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "clip", "vision_config": {}, "text_config": {"eos_token_id": 2}}))
    assert read_clip_config(tmp_path) == ClipConfig(eos_id=2)
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    content = {
        "model_type": "clip", "projection_dim": 768,
        "vision_config": {"hidden_size": 1}, "vision_config_dict": {**large, "image_size": 336, "patch_size": 14},
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "text_config_dict": None,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    expected = ClipConfig(TowerConfig(1024, 4096, 24, 16), TowerConfig(768, 3072, 12, 12), 768, 336, 14)
    assert read_clip_config(tmp_path) == expected


def test_a_wrong_folder_is_named(tmp_path):
    theirs(SHAPES[0], tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["surplus"] = tensors.pop("text_projection.weight")
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:5]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_clip(tmp_path)
    for line in ("missing text_projection.weight", "unknown surplus", "visual_projection.weight has shape (5, 32)"):
        assert line in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UserError, match="describes no CLIP: its model_type is 'siglip'"):
        load_clip(tmp_path)
    section = {"image_size": 30, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": section}))
    with pytest.raises(UserError, match="image_size=30 is no multiple of patch_size=14"):
        load_clip(tmp_path)


def test_tokens_begin_and_end_and_have_one_length(tmp_path):
    words = {"a": 0, "red": 1, "car": 2, "?": 3, "<s>": 4, "</s>": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encode = ClipTokenizer(tmp_path, ClipConfig(vocab_size=6, length=6))
    ids = encode(["a red car", "", "a a a a a a a a a"])
    assert ids.tolist() == [[4, 0, 1, 2, 5, 5], [4, 5, 5, 5, 5, 5], [4, 0, 0, 0, 0, 5]]
    with pytest.raises(UserError, match="more tokens than the 5"):
        ClipTokenizer(tmp_path, ClipConfig(vocab_size=5))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (50, 50), (20, 31)])
def test_pixels_are_prepared_as_clip_and_cmmd_do(size):
    """CLIP's own way as transformers does it; for CMMD, the centre square is scaled."""
    transformers = pytest.importorskip("transformers")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    assert np.abs(clip_pixels(image, 24) - expected).max() < 1e-5
    short = min(size)
    top, left = (size[0] - short) // 2, (size[1] - short) // 2
    square = image[top : top + short, left : left + short]
    assert np.array_equal(clip_pixels(image, 24, crop_first=True), clip_pixels(square, 24))


@pytest.mark.slow
def test_features_for_cmmd_are_unit_vectors_of_the_centre(tmp_path):
    torch, model = theirs(SHAPES[2], tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    found = clip_features(images, tmp_path)
    pixels = np.stack([clip_pixels(image[:, 10:50], 28) for image in images])
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = np.asarray(getattr(expected, "pooler_output", expected))
    assert np.allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert cmmd(found, found) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="images must be uint8"):
        clip_features(images[0], "absent")


@pytest.mark.slow
def test_a_batch_is_its_images(tmp_path):
    theirs(SHAPES[2], tmp_path)
    model, pixels = load_clip(tmp_path), np.random.default_rng(1).normal(size=(5, 28, 28, 3)).astype(np.float32)
    single = np.concatenate([images_of(model, pixels[i : i + 1]) for i in range(2)])
    assert np.allclose(images_of(model, pixels)[:2], single, atol=1e-5)
