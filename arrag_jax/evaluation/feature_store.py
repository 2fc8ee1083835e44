"""Keeps features of images on disk, so that a run continues where it stopped and later runs reuse them.

Images are taken ``SHARD`` at a time. The name of a shard's file is a hash of the bytes of its images and of the
network, so that a file can never belong to other images; nothing else is recorded.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.evaluation.image_sets import ImageSet, decoded
from arrag_jax.evaluation.metrics.features import Extractor, stream
from arrag_jax.evaluation.metrics.moments import Moments
from arrag_jax.files import atomic_write, folder_in

SHARD = 128  # images of a file; a run that is killed computes at most so many again


class FeatureStore:
    """Features in a folder, which several runs may share."""

    def __init__(self, folder: Path):
        self.folder = folder

    def features(self, images: ImageSet, extractor: Extractor, what: str) -> tuple[Float32[np.ndarray, "n D"], str]:
        """Returns the features of a set, and the identity of its images' bytes.

        Args:
          what: name of the set, for the progress bar.

        Raises:
          UserError: if an image cannot be read; the message names it.
        """
        found, keys = np.empty((len(images), extractor.width), np.float32), hashlib.sha256()
        with progress.bar(desc=f"features of {what}", total=len(images), unit="image") as bar:
            for first, shard, key in self._shards(images):
                keys.update(key.encode())
                found[first : first + len(shard)] = self._of_shard(images, first, shard, key, extractor)
                bar.update(len(shard))
        return found, keys.hexdigest()[:16]

    def moments(self, features: Float32[np.ndarray, "n D"], identity: str, extractor: Extractor) -> Moments:
        """Returns the exact moments of features, from the folder if they are there.

        The file has ``mu`` and ``sigma``, which pytorch-fid reads.
        """
        path = self._file(f"{extractor.name} moments of {identity}")
        with contextlib.suppress(UserError):  # absent, or damaged: they are summed again
            return Moments.load(path)
        moments = Moments.empty(extractor.width)
        moments.add(features)
        if moments.count > 1:
            moments.save(path)
        return moments

    def kept(self, key: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> Float64[np.ndarray, "..."]:
        """Returns numbers from the folder, or computes them and keeps them there.

        Args:
          key: identifies everything that the numbers depend on.
        """
        path = self._file(key)
        held = _load(path, shape, np.float64)
        if held is None:
            held = compute()
            _save(path, held)
        return held

    def _shards(self, images: ImageSet) -> Iterator[tuple[int, list[bytes], str]]:
        for first in range(0, len(images), SHARD):
            data = [images.read(number) for number in range(first, min(first + SHARD, len(images)))]
            digest = hashlib.sha256()
            for each in data:
                digest.update(hashlib.sha256(each).digest())
            yield first, data, digest.hexdigest()

    def _of_shard(
        self, images: ImageSet, first: int, data: list[bytes], key: str, extractor: Extractor
    ) -> Float32[np.ndarray, "n D"]:
        path = self._file(f"{extractor.name} {key}")
        held = _load(path, (len(data), extractor.width), np.float32)
        if held is not None:
            return held

        def prepare(number: int) -> np.ndarray:
            return extractor.prepare(decoded(images.ids[first + number], data[number], extractor.size))

        found = np.concatenate(list(stream(extractor.embed, prepare, range(len(data)))))
        _save(path, found)
        return found

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return folder_in(self.folder, name[:2]) / f"{name}.npz"


def _save(path: Path, numbers: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, numbers=numbers)


def _load(path: Path, shape: tuple[int, ...], dtype: type[np.floating]) -> np.ndarray | None:
    """Returns the numbers in a file; None if it is absent or damaged, and has to be written again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            numbers = file["numbers"]
    except Exception:  # zipfile, zlib and numpy raise many types for damage
        return None
    return numbers if numbers.shape == shape and numbers.dtype == dtype else None
