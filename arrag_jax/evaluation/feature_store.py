"""Keeps features of images on disk, so that a run continues where it stopped and later runs reuse them.

Images are taken ``SHARD`` at a time. The name of a shard's file is a hash of the bytes of its images and of the
network, so that a file can never belong to other images; nothing else is recorded.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from arrag_jax.errors import UserError
from arrag_jax.evaluation.image_sets import ImageSet, decoded
from arrag_jax.evaluation.metrics.features import Extractor, stream
from arrag_jax.evaluation.metrics.moments import Moments
from arrag_jax.files import atomic_write, folder_in, remove_temporary
from arrag_jax.work import HERE, Engine, Opened, Report, run_work

SHARD = 128  # images of a file; a run that is killed computes at most so many again


class FeatureStore:
    """Features in a folder, which several runs may share."""

    def __init__(self, folder: Path):
        self.folder = folder

    def features(
        self, images: ImageSet, extractor: Opened[Extractor], what: str, engine: Engine = HERE
    ) -> tuple[Float32[np.ndarray, "n D"], str]:
        """Returns the features of a set, and the identity of its images' bytes.

        Args:
          extractor: the network; what opens it again must be picklable where the engine sends it.
          what: name of the set, for the progress bar.
          engine: where they are computed; all its machines need access to the folder.

        Raises:
          UserError: if an image cannot be read; the message names it.
        """
        found, digest = np.empty((len(images), extractor().width), np.float32), hashlib.sha256()
        sizes = {first: min(SHARD, len(images) - first) for first in range(0, len(images), SHARD)}
        make = functools.partial(_ShardWriter, self, images, extractor, sizes)
        # without ``kept``: an interruption need not wait for the shard, because a later run computes it again
        keys = dict(run_work(list(sizes), make, sizes, f"features of {what}", kept=False, engine=engine))
        for first, size in sizes.items():
            digest.update(keys[first].encode())
            shard = self.held(keys[first], extractor(), size)
            if shard is None:
                raise UserError(f"{self.folder} lacks features that a worker has written; give a folder that all share")
            found[first : first + size] = shard
        for folder in self.folder.glob("??"):
            remove_temporary(folder)  # of workers that have died
        return found, digest.hexdigest()[:16]

    def held(self, key: str, extractor: Extractor, size: int) -> Float32[np.ndarray, "n D"] | None:
        """Returns the features of a shard, by the hash of its images; None if they are not there."""
        return _load(self._shard(key, extractor), (size, extractor.width), np.float32)

    def write(self, key: str, extractor: Extractor, features: Float32[np.ndarray, "n D"]) -> None:
        """Keeps the features of a shard."""
        _save(self._shard(key, extractor), features)

    def _shard(self, key: str, extractor: Extractor) -> Path:
        return self._file(f"{extractor.name} {key}")

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

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return folder_in(self.folder, name[:2]) / f"{name}.npz"


@dataclasses.dataclass(frozen=True)
class _ShardWriter:
    """Computes the features of the shard that begins at an image, unless they are kept; a worker of ``work``."""

    store: FeatureStore
    images: ImageSet
    extractor: Opened[Extractor]
    sizes: Mapping[int, int]

    def __call__(self, first: int, report: Report) -> str:
        size, extractor, digest = self.sizes[first], self.extractor(), hashlib.sha256()
        data = [self.images.read(first + number) for number in range(size)]
        for each in data:
            digest.update(hashlib.sha256(each).digest())
        key = digest.hexdigest()

        def prepare(number: int) -> np.ndarray:
            return extractor.prepare(decoded(self.images.ids[first + number], data[number], extractor.size))

        if self.store.held(key, extractor, size) is None:
            self.store.write(key, extractor, np.concatenate(list(stream(extractor.embed, prepare, range(size)))))
        report.count(size)
        return key


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
