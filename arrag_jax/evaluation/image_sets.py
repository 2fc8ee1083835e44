"""Sets of image files that are compared: those of a run, and a reference in a folder or a tar."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arrag_jax.data import pixels, sources
from arrag_jax.data.entries import Entry
from arrag_jax.data.examples import BadImage
from arrag_jax.errors import UserError
from arrag_jax.interfaces import ImageFile

TAR_MEMBER = "!"  # between the path of a tar and the name of its member


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Image files in a fixed order.

    Attributes:
      ids: one line of text per image.
      categories: of each image; "" = none.
      read: returns the bytes of an image by its number; raises ``UserError`` if it cannot be read. Can be pickled.
    """

    ids: Sequence[str]
    categories: Sequence[str]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the pixels of an image, of its own size; raises UserError if it cannot be read."""
        return decoded(self.ids[number], self.read(number))

    def size(self, number: int) -> tuple[int, int]:
        """Returns the height and width in an image's header; raises UserError if it cannot be read."""
        try:
            with Image.open(io.BytesIO(self.read(number)), formats=pixels.FORMATS) as image:
                return image.height, image.width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.ids[number]}: not an image that PIL reads; mend it, or take it out") from error

    def first(self, count: int) -> "ImageSet":
        """Returns the set of the first images."""
        return ImageSet(self.ids[:count], self.categories[:count], self.read)

    def of_category(self, category: str) -> list[int]:
        """Returns the numbers of a category's images."""
        return [number for number, each in enumerate(self.categories) if each == category]


def decoded(id_: str, data: bytes, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an image file; raises UserError if it is no whole image.

    Args:
      size: height and width to scale and crop it to; None = its own size.
    """
    try:
        return pixels.decode(data, size)
    except BadImage as reason:
        raise UserError(f"{id_}: {reason}; mend it, or take it out") from reason


def drawn_set(folder: Path, images: Sequence[ImageFile]) -> ImageSet:
    """Returns the images of a run."""
    ids, categories = [image.path for image in images], [image.prompt.category for image in images]
    return ImageSet(ids, categories, functools.partial(_read_drawn, folder, ids))


def _read_drawn(folder: Path, ids: Sequence[str], number: int) -> bytes:
    try:
        return (folder / ids[number]).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {folder / ids[number]}: {error.strerror}; draw it again") from error


def reference_set(source: str) -> tuple[ImageSet, str]:
    """Returns the images of a folder, with all folders and tars in it, or of one tar, and the identity of the set.

    The category of an image is the folder that it lies in.

    Raises:
      UserError: if there is no such folder or tar, or an image in it certainly cannot be read.
    """
    entries = [x for x in sources.list_source(source, key="--reference").entries if not x.is_passed_over]
    bad = next((entry for entry in entries if entry.fault), None)
    if bad is not None:
        raise UserError(f"--reference={source}: {bad.id}: {bad.fault}; mend it, or take it out")
    ids = [entry.id for entry in entries]
    identity = hashlib.sha256(json.dumps([(entry.id, entry.size) for entry in entries]).encode())
    read = functools.partial(_read_reference, source, entries)
    return ImageSet(ids, [_folder_of(id_) for id_ in ids], read), identity.hexdigest()[:16]


def _read_reference(source: str, entries: Sequence[Entry], number: int) -> bytes:
    try:
        return sources.read_entry(sources.root_of(source), entries[number])
    except BadImage as reason:
        raise UserError(f"--reference={source}: {entries[number].id}: {reason}; mend it, or take it out") from reason


def _folder_of(id_: str) -> str:
    return PurePosixPath(id_.rpartition(TAR_MEMBER)[2]).parent.name


def statistics(path: Path, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns mean, covariance and number of images (0 = unknown) of a reference, as pytorch-fid saves them.

    Raises:
      UserError: if the file is missing, damaged, or holds other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else 0
    except KeyError as error:
        raise UserError(f"--reference={path} holds no {error}; give a file with mu and sigma, or images") from error
    except Exception as error:  # zipfile, zlib and numpy raise many types for damage
        reason = " ".join(str(error or type(error).__name__).split())
        raise UserError(f"--reference={path} is no whole .npz file ({reason}); copy it again") from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        shapes = f"mu {list(mean.shape)} and sigma {list(covariance.shape)}"
        raise UserError(f"--reference={path} holds {shapes}; the features of the FID network are {width}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"--reference={path} holds NaN or infinite numbers; copy it again")
    return mean, covariance, count
