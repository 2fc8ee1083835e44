"""Prompts of a LlamaGen: classes, captions with stored features, and the golden text encoder."""

import builtins
import json
import shutil

import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.models import llamagen_prompts, t5_text
from arrag_jax.models.llamagen_prompts import CaptionEncoder, ClassNumbers, save_features
from arrag_jax.models.t5 import T5Features
from helpers import llamagens


def features(rows: int = 3, length: int = 8, width: int = 7):
    rng = np.random.default_rng(0)
    mask = np.arange(length)[None] >= length - np.array([8, 1, 5])[:rows, None]
    return np.where(mask[..., None], rng.normal(size=(rows, length, width)), 0).astype(np.float32), mask


def test_classes_are_numbers():
    np.testing.assert_array_equal(ClassNumbers(1000)(["207", " 0 "]), [207, 0])
    for prompt in ("a cat", "1000", "-1", "", "2.0"):
        with pytest.raises(UserError, match="is no class: give a number from 0 to 999"):
            ClassNumbers(1000)([prompt])


def test_stored_features_are_found_by_caption(tmp_path):
    values, mask = features()
    save_features(tmp_path / "features.npz", ["a cat", "two dogs", "sushi"], values, mask)
    encode = CaptionEncoder(tmp_path, 7, 8)
    found = encode(["sushi", "a cat", "sushi"])
    np.testing.assert_array_equal(found[0], values[[2, 0, 2]])
    np.testing.assert_array_equal(found[1], mask[[2, 0, 2]])
    np.testing.assert_array_equal(encode(["sushi"], 6)[0], values[2:, 2:])  # pads go first
    for prompts, length, words in (
        (["a bus"], None, r"features\.npz has no features of the prompt 'a bus'"),
        ([" "], None, "a prompt is empty"),
        (["sushi"], 4, "prompt too long: 5 tokens, at most 4"),
    ):
        with pytest.raises(UserError, match=words):
            encode(prompts, length)


def test_features_padded_on_the_right_or_shorter_are_moved(tmp_path):
    values, mask = features()
    right = np.stack([np.concatenate([x[m], x[~m] + 1]) for x, m in zip(values, mask, strict=True)])
    save_features(tmp_path / "features.npz", ["a", "b", "c"], right, mask[:, ::-1])
    np.testing.assert_array_equal(CaptionEncoder(tmp_path, 7, 8)(["a", "b", "c"])[0], values)
    np.testing.assert_array_equal(CaptionEncoder(tmp_path, 7, 10)(["a", "b", "c"])[0][:, 2:], values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": np.zeros((3, 8, 6), np.float32)}, r"must hold 3 prompts and features of \[3, T <= 8, 7\]"),
        ({"features": np.full((3, 8, 7), np.nan, np.float32)}, "must be finite floats"),
        ({"mask": np.zeros((3, 8))}, "a 1 in every row"),
        ({"prompts": np.array([1, 2, 3])}, "must hold 3 prompts"),
        ({"prompts": np.array(["a", None, "b"], object)}, r"is no \.npz of prompts, features and mask"),
    ],
)
def test_bad_stored_features_are_named(tmp_path, change, words):
    values, mask = features()
    content = {"prompts": np.array(["a", "b", "c"]), "features": values, "mask": mask, **change}
    np.savez(tmp_path / "features.npz", **content)
    with pytest.raises(UserError, match=words):
        CaptionEncoder(tmp_path, 7, 8)


def test_a_folder_without_either_is_named(tmp_path):
    with pytest.raises(UserError, match=r"put a T5 encoder .* or features of your captions"):
        CaptionEncoder(tmp_path, 7, 8)


def test_captions_are_cleaned_as_the_references(monkeypatch):
    for given in json.loads(llamagens.path("text_clean.json").read_text()):
        if "mojibake" in given["text"]:
            continue  # ftfy's work
        assert t5_text._once(given["text"]) == given["cleaned_once"]
        assert t5_text.clean_caption(given["text"]) == given["cleaned"]


def test_mis_decoded_letters_are_mended_by_ftfy():
    pytest.importorskip("ftfy")
    assert t5_text.clean_caption("naive â€™ mojibake") == "naive † mojibake"


def test_text_features_are_the_references(tmp_path):
    pytest.importorskip("transformers")
    prompts, golden = llamagens.golden()["prompts"], llamagens.arrays("t2i_120")
    shutil.copytree(llamagens.path("t5"), tmp_path / "t5")
    encode = CaptionEncoder(tmp_path, 16, 120)
    values, mask = encode(prompts)
    np.testing.assert_array_equal(mask, golden["c_emb_masks"])
    for row, states, real in zip(values, golden["t5_last_hidden_state"], golden["t5_attention_mask"], strict=True):
        count = int(real.sum())
        np.testing.assert_allclose(row[120 - count :], states[:count], atol=1e-5)
        assert not row[: 120 - count].any()
    np.testing.assert_array_equal(encode(prompts[1:2])[0][0], values[1])  # looked up, and of its prompt alone


def test_computed_features_stay_for_the_newest_captions_and_the_encoder_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "t5").mkdir()
    encode, calls = CaptionEncoder(tmp_path, 7, 8), []

    def compute(captions):
        calls.append(list(captions))
        values, mask = features(1)
        return np.repeat(values, len(captions), 0) + len(calls), np.repeat(mask, len(captions), 0)

    monkeypatch.setattr(llamagen_prompts, "KEPT", 2)
    monkeypatch.setattr(encode, "_compute", compute)
    first = encode(["a", "b", "a"])[0]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(encode(["b"])[0][0], first[1])
    assert encode(["c", "d", "e", "a"])[0].shape == (4, 8, 7)  # more than are kept, and one that is kept
    assert list(encode.computed) == ["d", "e"]
    encode(["a", "e"])
    assert calls == [["a", "b"], ["c", "d", "e"], ["a"]]


@pytest.mark.slow
def test_absent_libraries_and_damaged_encoders_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        T5Features(tmp_path, 8)(["a"])
    shutil.copyfile(llamagens.path("t5/tokenizer.json"), tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="holds no T5 encoder"):
        T5Features(tmp_path, 8)(["a"])
    imported = builtins.__import__

    def without(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install transformers torch, or put features"):
        T5Features(tmp_path, 8)(["a"])
