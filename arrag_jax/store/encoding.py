"""Images to codes, batch by batch, while the next ones are read."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from arrag_jax.data.examples import BadImage, Example, Examples
from arrag_jax.errors import UserError
from arrag_jax.store.shards import ShardSettings

READERS = 8  # threads that decode images ahead of the encoder
# uint8 [B, h, w, 3] → (int [B, H, W] codes, float [B, H, W, C] encoder outputs before quantisation); may answer with
# arrays that are still being computed
Encode = Callable[[np.ndarray], tuple[Any, Any]]


def require_images(examples: Examples, settings: ShardSettings) -> None:
    """Raises UserError if there are fewer images than ``settings`` ask for."""
    if len(examples) < settings.num_images:
        where = f"{settings.source}/{settings.split}" if settings.split else settings.source
        raise UserError(f"{settings.num_images} images asked of {where}: it has {len(examples)}")


def encoded(
    examples: Examples,
    numbers: range,
    encode: Encode,
    batch_size: int,
    settings: ShardSettings,
    skip: Callable[[int, BadImage], None] | None = None,
) -> Iterator[tuple[list[Example], np.ndarray, np.ndarray]]:
    """The examples with these numbers, in order, and what ``encode`` makes of their images.

    Which images share a batch depends on these numbers and on which of them are bad, on nothing else.

    Args:
      encode: called with exactly ``batch_size`` images; the last batch is padded with zeros. Called again before its
        last answers are looked at, so that every device has work.
      settings: whose grid and codebook the codes must be of.
      skip: told the number and the reason of every bad image; None = the first one is raised.

    Yields:
      n ≤ batch_size examples, their codes (little-endian uint16 [n, H, W]) and encoder outputs [n, H, W, C].

    Raises:
      UserError: codes of another grid or outside the codebook, or encoder outputs that are not finite.
    """

    def fetched(batch: list[Example], answer: tuple[Any, Any]) -> tuple[list[Example], np.ndarray, np.ndarray]:
        codes, latents = (np.asarray(x)[: len(batch)] for x in answer)
        if not np.isfinite(latents).all():
            raise UserError("the tokenizer gave vectors that are not finite; its weights hold NaN or infinite numbers")
        return batch, _checked(codes, settings), latents

    unfinished: deque = deque()
    for batch in _batches(_read_ahead(examples, numbers, batch_size, skip), batch_size):
        images = np.stack([example["image"] for example in batch])
        padded = np.pad(images, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
        unfinished.append((batch, encode(padded)))
        if len(unfinished) > jax.local_device_count():
            yield fetched(*unfinished.popleft())
    for batch, answer in unfinished:
        yield fetched(batch, answer)


def _read_ahead(
    examples: Examples, numbers: range, window: int, skip: Callable[[int, BadImage], None] | None
) -> Iterator[Example]:
    """The good examples in order; ``window`` of them are being read or wait."""
    waiting = iter(numbers)
    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque((i, pool.submit(examples.__getitem__, i)) for i in itertools.islice(waiting, window))
        try:
            while ahead:
                number, reading = ahead.popleft()
                try:
                    example = reading.result()
                except BadImage as reason:
                    if skip is None:
                        raise
                    skip(number, reason)
                    example = None
                ahead.extend((i, pool.submit(examples.__getitem__, i)) for i in itertools.islice(waiting, 1))
                if example is not None:
                    yield example
        finally:
            pool.shutdown(cancel_futures=True)  # where the caller stopped early


def _batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _checked(codes: np.ndarray, settings: ShardSettings) -> np.ndarray:
    if codes.shape[1:] != tuple(settings.grid):
        raise UserError(f"the tokenizer gives grids {codes.shape[1:]}, {tuple(settings.grid)} were expected")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise UserError(
            f"the tokenizer gave codes from {codes.min()} to {codes.max()}; its codebook has {settings.codebook_size}"
        )
    return codes.astype("<u2")
