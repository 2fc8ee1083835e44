"""Reads the colours of objects by CLIP, as GenEval does: ten colours in three sentences, nearest to a crop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from arrag_jax.evaluation.geneval.rules import COLORS
from arrag_jax.evaluation.pretrained import folder_hashes

SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BATCH = 16  # crops that are encoded at once


@runtime_checkable
class ImageTextEncoder(Protocol):
    """A CLIP: vectors of length 1 of images and of texts, in one space."""

    def facts(self) -> dict[str, Any]:
        """Returns what identifies the weights, as JSON values."""
        ...

    def images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n C"]:
        """Returns the vectors of images, which may have different sizes."""
        ...

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n C"]:
        """Returns the vectors of texts."""
        ...


class Colors:
    """Reads colours with an encoder; the vectors of a class are computed once."""

    def __init__(self, encoder: ImageTextEncoder):
        self.encoder = encoder
        self._known: dict[str, Float[np.ndarray, "10 C"]] = {}

    def __call__(self, crops: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> list[str]:
        """Returns the colour, of ``COLORS``, of the object in each crop.

        Args:
          names: classes of the objects.
        """
        if not crops:
            return []
        vectors = self.encoder.images(crops)
        return [COLORS[int((self._of_class(name) @ x).argmax())] for name, x in zip(names, vectors, strict=True)]

    def _of_class(self, name: str) -> Float[np.ndarray, "10 C"]:
        if name not in self._known:
            texts = [sentence.format(color=color, name=name) for color in COLORS for sentence in SENTENCES]
            means = self.encoder.texts(texts).reshape(len(COLORS), len(SENTENCES), -1).mean(1)
            self._known[name] = means / np.linalg.norm(means, axis=-1, keepdims=True)
        return self._known[name]


class Clip:
    """The CLIP in a folder, as an ``ImageTextEncoder``; GenEval's is OpenAI's ViT-L/14.

    Raises:
      UserError: if the folder does not hold a CLIP.
    """

    def __init__(self, folder: str):
        from arrag_jax.models import clip

        self._folder, self._clip, self._model = Path(folder), clip, clip.load_clip(folder)
        self._tokenizer = clip.ClipTokenizer(self._folder, clip.read_clip_config(self._folder))

    def facts(self) -> dict[str, Any]:
        """Returns the hashes of the folder's files."""
        return folder_hashes(self._folder)

    def images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n C"]:
        """Returns the vectors of images."""
        side = self._model.config.image_size
        pixels = np.stack([self._clip.clip_pixels(image, side) for image in images])
        parts = []
        for start in range(0, len(pixels), BATCH):
            part = pixels[start : start + BATCH]
            padded = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), part.dtype)])  # one shape
            parts.append(np.asarray(self._clip.unit_image_features(self._model, jnp.asarray(padded)))[: len(part)])
        return np.concatenate(parts)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n C"]:
        """Returns the vectors of texts."""
        return np.asarray(self._clip.unit_text_features(self._model, jnp.asarray(self._tokenizer(texts))))
