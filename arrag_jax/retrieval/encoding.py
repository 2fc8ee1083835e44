"""Images to codes, batch by batch, while the next batch is read."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from arrag_jax.errors import UserError
from arrag_jax.retrieval.shards import ShardSettings

READERS = 8  # threads that decode images ahead of the encoder
# uint8 [B, h, w, 3] → (int [B, H, W] codes, float [B, H, W, C] encoder outputs before quantisation)
Encode = Callable[[np.ndarray], tuple[Any, Any]]
Example = dict[str, Any]


@runtime_checkable
class Examples(Protocol):
    """A random-access source of dicts with "image", uint8 [h, w, 3], all of one size; read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def require_images(examples: Examples, settings: ShardSettings) -> None:
    """Raises UserError if there are fewer images than ``settings`` ask for."""
    if len(examples) < settings.num_images:
        where = f"{settings.source}/{settings.split}"
        raise UserError(f"{settings.num_images} images asked of {where}: it has {len(examples)}")


def encoded(
    examples: Examples, numbers: range, encode: Encode, batch_size: int, settings: ShardSettings
) -> Iterator[tuple[list[Example], np.ndarray, np.ndarray]]:
    """The examples with these numbers, in order, and what ``encode`` makes of their images.

    Args:
      encode: called with exactly ``batch_size`` images; the last batch is padded with zeros.
      settings: whose grid and codebook the codes must be of.

    Yields:
      n ≤ batch_size examples, their codes (little-endian uint16 [n, H, W]) and encoder outputs [n, H, W, C].

    Raises:
      UserError: codes of another grid or outside the codebook.
    """
    for batch in _read_ahead(examples, numbers, batch_size):
        images = np.stack([example["image"] for example in batch])
        padded = np.pad(images, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        codes, latents = (np.asarray(x)[: len(batch)] for x in encode(padded))
        yield batch, _checked(codes, settings), latents


def _read_ahead(examples: Examples, numbers: range, batch_size: int) -> Iterator[list[Example]]:
    with ThreadPoolExecutor(READERS) as pool:
        parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        ahead = [pool.submit(examples.__getitem__, i) for i in parts[0]]
        for following in [*parts[1:], range(0)]:
            batch = [read.result() for read in ahead]
            ahead = [pool.submit(examples.__getitem__, i) for i in following]
            yield batch


def _checked(codes: np.ndarray, settings: ShardSettings) -> np.ndarray:
    if codes.shape[1:] != tuple(settings.grid):
        raise UserError(f"the tokenizer gives grids {codes.shape[1:]}, {tuple(settings.grid)} were expected")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise UserError(
            f"the tokenizer gave codes from {codes.min()} to {codes.max()}; its codebook has {settings.codebook_size}"
        )
    return codes.astype("<u2")
