"""Computes features of captions with a T5 encoder. It needs PyTorch and ``transformers``, which are optional extras."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from tokenizers import Tokenizer

from arrag_jax.errors import UserError
from arrag_jax.models.t5_text import clean_caption
from arrag_jax.parsing import shown


def caption_features(
    directory: Path, captions: Sequence[str], length: int
) -> tuple[Float[np.ndarray, "N T C"], Bool[np.ndarray, "N T"]]:
    """Returns float32 features of captions, padded on the left with zeros, and the mask of the real ones.

    Args:
      directory: folder of a T5 encoder such as flan-t5-xl: config.json, weights and tokenizer.json.
      captions: are cleaned first, see ``clean_caption``.
      length: T, the number of tokens; longer captions are cut.

    Raises:
      UserError: if PyTorch or ``transformers`` is not installed, or the folder holds no T5 encoder.
    """
    try:
        import torch  # imported here only, because everything else runs without them
        from transformers import T5EncoderModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            "features of captions are computed by transformers and PyTorch, which are not installed: pip install "
            "transformers torch, or put features that were computed elsewhere into features.npz"
        ) from error
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path} cannot be read as a tokenizer ({shown(str(error))}); copy the T5 again") from error
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token=tokenizer.id_to_token(0))
    logging.disable_progress_bar()
    try:
        encoder = T5EncoderModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = shown(" ".join(str(error).split()))
        raise UserError(f"{directory} holds no T5 encoder ({reason}); copy it again") from error
    features, masks = [], []
    for encoding in tokenizer.encode_batch([clean_caption(caption) for caption in captions]):
        ids, mask = torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])
        with torch.no_grad():
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0].numpy()
        real = sum(encoding.attention_mask)
        padded = np.zeros_like(states)
        padded[length - real :] = states[:real]
        features.append(padded)
        masks.append(np.arange(length) >= length - real)
    return np.stack(features), np.stack(masks)
