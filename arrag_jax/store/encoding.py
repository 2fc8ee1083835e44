"""Encodes images to codes in batches, while threads read the next images."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt16

from arrag_jax.data.examples import BadImage, Example, Examples, caption_of
from arrag_jax.errors import UserError
from arrag_jax.store.shards import ShardSettings

READERS = 8  # threads that decode images ahead of the encoder
# uint8 [B, h, w, 3] → (int [B, H, W] codes, float [B, H, W, C] encoder outputs before quantisation); JAX may still be
# computing the returned arrays
Encode = Callable[[np.ndarray], tuple[Any, Any]]
Skip = Callable[[int, BadImage], None]  # called with the number of a bad image and the reason


class Batch(NamedTuple):
    """A batch of encoded images.

    Attributes:
      numbers: the images' numbers in their source.
      examples: the images.
      codes: the code grids, little-endian.
      latents: encoder outputs before quantisation.
    """

    numbers: list[int]
    examples: list[Example]
    codes: UInt16[np.ndarray, "n H W"]
    latents: Float[np.ndarray, "n H W C"]

    @property
    def captions(self) -> list[str]:
        """The images' captions.

        Raises:
          UserError: if the images have no captions.
        """
        return [caption_of(example) for example in self.examples]

    def of(self, taken: Bool[np.ndarray, " n"]) -> "Batch":
        """Returns the batch that holds only the images where ``taken`` is True."""
        numbers = list(itertools.compress(self.numbers, taken))
        examples = list(itertools.compress(self.examples, taken))
        return Batch(numbers, examples, self.codes[taken], self.latents[taken])


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The images of a source and the function that encodes them.

    Attributes:
      examples: the images, by number.
      source_id: image number → one line that says where the image came from.
      encode: called with exactly ``batch_size`` images; the last batch of a shard is padded with zeros. It is called
        for later batches before the results of earlier ones are fetched, so that every device has work.
      batch_size: images per call of ``encode``.
    """

    examples: Examples
    source_id: Callable[[int], str]
    encode: Encode
    batch_size: int

    def require(self, settings: ShardSettings) -> None:
        """Raises UserError if there are fewer than ``settings.num_images`` images."""
        if len(self.examples) < settings.num_images:
            where = f"{settings.source}/{settings.split}" if settings.split else settings.source
            raise UserError(f"{settings.num_images} images requested of {where}: it has {len(self.examples)}")

    def batches(self, numbers: Iterable[int], settings: ShardSettings, skip: Skip) -> Iterator[Batch]:
        """Yields the images with these numbers, in order, in batches of up to ``batch_size``.

        Which images share a batch depends only on these numbers and on which images are bad.

        Args:
          numbers: the numbers of the images to encode.
          settings: the codes must fit its grid and codebook size.
          skip: called for every bad image.

        Raises:
          UserError: if codes have another grid or lie outside the codebook, or encoder outputs are not finite.
        """
        unfinished: deque[tuple[list[tuple[int, Example]], tuple[Any, Any]]] = deque()
        for read in _in_batches(_read_ahead(self.examples, numbers, self.batch_size, skip), self.batch_size):
            images = np.stack([example["image"] for _, example in read])
            padded = np.pad(images, ((0, self.batch_size - len(read)), (0, 0), (0, 0), (0, 0)))
            unfinished.append((read, self.encode(padded)))
            if len(unfinished) > jax.local_device_count():
                yield _fetched(*unfinished.popleft(), settings)
        for read, answer in unfinished:
            yield _fetched(read, answer, settings)


def _read_ahead(examples: Examples, numbers: Iterable[int], window: int, skip: Skip) -> Iterator[tuple[int, Example]]:
    """Yields (number, example) of each good image in order; up to ``window`` images are read ahead."""
    waiting = iter(numbers)
    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque((i, pool.submit(examples.__getitem__, i)) for i in itertools.islice(waiting, window))
        try:
            while ahead:
                number, reading = ahead.popleft()
                try:
                    example = reading.result()
                except BadImage as reason:
                    skip(number, reason)
                    example = None
                ahead.extend((i, pool.submit(examples.__getitem__, i)) for i in itertools.islice(waiting, 1))
                if example is not None:
                    yield number, example
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may stop early


def _in_batches(examples: Iterator[tuple[int, Example]], size: int) -> Iterator[list[tuple[int, Example]]]:
    while batch := list(itertools.islice(examples, size)):
        yield batch


def _fetched(read: list[tuple[int, Example]], answer: tuple[Any, Any], settings: ShardSettings) -> Batch:
    """Fetches the encoder's results for a batch and checks them."""
    codes, latents = (np.asarray(x)[: len(read)] for x in answer)
    if not np.isfinite(latents).all():
        raise UserError("the tokenizer gave vectors that are not finite; its weights hold NaN or infinite numbers")
    if codes.shape[1:] != tuple(settings.grid):
        raise UserError(f"the tokenizer gives grids {codes.shape[1:]}, {tuple(settings.grid)} were expected")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise UserError(
            f"the tokenizer gave codes from {codes.min()} to {codes.max()}; its codebook has {settings.codebook_size}"
        )
    return Batch([number for number, _ in read], [example for _, example in read], codes.astype("<u2"), latents)
