"""Computes features of captions with a T5 encoder. It needs PyTorch and ``transformers``, which are optional extras."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from tokenizers import Tokenizer

from arrag_jax.errors import UserError
from arrag_jax.models.t5_text import clean_caption
from arrag_jax.parsing import shown


class T5Features:
    """Computes features of captions. The encoder is read at the first call and stays in memory."""

    def __init__(self, directory: Path, length: int):
        """Takes the folder of a T5 encoder such as flan-t5-xl (config.json, weights, tokenizer.json), and T tokens."""
        self.directory, self.length = directory, length

    def __call__(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "N T C"], Bool[np.ndarray, "N T"]]:
        """Returns float32 features of captions, padded on the left with zeros, and the mask of the real ones.

        Captions are cleaned first, see ``clean_caption``; longer ones than T tokens are cut.

        Raises:
          UserError: if PyTorch or ``transformers`` is not installed, or the folder holds no T5 encoder.
        """
        tokenizer, encode = self._encoder
        features, masks = [], []
        for encoding in tokenizer.encode_batch([clean_caption(caption) for caption in captions]):
            states = encode(encoding.ids, encoding.attention_mask)
            real = sum(encoding.attention_mask)
            padded = np.zeros_like(states)
            padded[self.length - real :] = states[:real]
            features.append(padded)
            masks.append(np.arange(self.length) >= self.length - real)
        return np.stack(features), np.stack(masks)

    @functools.cached_property
    def _encoder(self) -> tuple[Tokenizer, Callable[[list[int], list[int]], np.ndarray]]:
        """The tokenizer, and the function from the ids and the mask of one caption to states [T, C]."""
        try:
            import torch  # imported here only, because everything else runs without them
            from transformers import T5EncoderModel
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                "features of captions are computed by transformers and PyTorch, which are not installed: pip install "
                "transformers torch, or put features that were computed elsewhere into features.npz"
            ) from error
        path = self.directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{path} cannot be read as a tokenizer ({shown(str(error))}); copy the T5 again") from error
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=0, pad_token=tokenizer.id_to_token(0))
        logging.disable_progress_bar()
        try:
            model = T5EncoderModel.from_pretrained(self.directory, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            reason = shown(" ".join(str(error).split()))
            raise UserError(f"{self.directory} holds no T5 encoder ({reason}); copy it again") from error

        def encode(ids: list[int], mask: list[int]) -> np.ndarray:
            with torch.no_grad():
                given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
                return model(**given).last_hidden_state[0].numpy()

        return tokenizer, encode
