"""Images that go through a model's tokenizer: what the commands that encode a data set share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.data.emoji_scenes import load_source
from arrag_jax.errors import UserError
from arrag_jax.models.janus import Janus
from arrag_jax.nn.vq import from_uint8
from arrag_jax.retrieval.encoding import Encode


def load_images(source: str, split: str, data_dir: str | Path, tokenizer: Janus) -> Sequence[dict[str, Any]]:
    """Random-access source of a split whose images the tokenizer's grid covers exactly.

    Args: as ``load_source``.

    Raises:
      UserError: unknown source or split, or images of another size.
    """
    examples = load_source(source, split, data_dir)
    if len(examples) == 0:
        raise UserError(f"split {split} of {source} is empty; choose another")
    found, wanted = examples[0]["image"].shape, (*tokenizer.config.image_size, 3)
    if found != wanted:
        raise UserError(f"images of {source} are {found}, the model's tokenizer takes {wanted}; use another model")
    return examples


def encoder(tokenizer: Janus) -> Encode:
    """Codes and latents of uint8 images by this tokenizer."""

    def encode(images: np.ndarray) -> tuple[Any, Any]:
        codes, latents = tokenizer.encode_images(from_uint8(images))
        return codes.reshape(-1, *tokenizer.grid), latents

    return encode
