"""The interface of image sources: examples by number, and the errors for images that cannot be read."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from arrag_jax.errors import UNPRINTABLE, UserError

Example = dict[str, Any]
# Prefixes of reasons in a file of bad images that mean no damage: the file may be an image but is not read, or the
# image is already in the source. Both kinds are left out, and neither counts as an unreadable image.
PASSED_OVER, DUPLICATE = "passed over: ", "duplicate of "
# Errors of files that occur again on every attempt; others (network errors, too many open files) may be temporary.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
ONE_IN = 20  # of few images, at most one in this many may be unreadable, see ``most_bad``


class BadImage(UserError):
    """An image cannot be read. The message is the reason alone; the caller knows the name of the image."""


@runtime_checkable
class Examples(Protocol):
    """A random-access source of dicts with "image", uint8 [h, w, 3], all of one size; several threads read it.

    An image that can never be read raises ``BadImage``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Images(Examples, Protocol):
    """The examples of one split. All have ids, and captions if these were requested."""

    def source_id(self, index: int) -> str:
        """Returns the id of an image: one line of text, unique in the source."""
        ...

    def caption(self, index: int) -> str:
        """Returns an image's caption in one line ("" = none) without decoding pixels.

        Raises:
          BadImage: if the image is already known to be unreadable.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """An image source: a folder, a tar or a data set; ``data.registry.open_source`` opens it.

    Attributes:
      words: all words of the captions, if they are known without reading the captions (every image then has a caption);
        else None.
      identity: a text that changes if the images or their captions change; "" if the source's name determines them.
    """

    @property
    def words(self) -> tuple[str, ...] | None: ...

    @property
    def identity(self) -> str: ...

    def images(self, split: str) -> Images:
        """Returns the images of a split or of a slice such as "train[:100]".

        Raises:
          UserError: if there is no such split, or it is empty.
        """
        ...


class Subset:
    """Some images of a split, in the given order (``Images``)."""

    def __init__(self, images: Images, numbers: Sequence[int]):
        self._images, self._numbers = images, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._images[self._numbers[index]]

    def source_id(self, index: int) -> str:
        """Returns the id of an image."""
        return self._images.source_id(self._numbers[index])

    def caption(self, index: int) -> str:
        """Returns the caption of an image."""
        return self._images.caption(self._numbers[index])


def most_bad(total: int, share: float, least: int) -> int:
    """Returns how many of ``total`` images may be unreadable.

    Args:
      share: allowed share of all images.
      least: this many are allowed even if they exceed ``share``, but at most one in ``ONE_IN`` images (and at least one
        image).
    """
    return int(max(share * total, min(least, max(1, total // ONE_IN))))


def caption_of(example: Example) -> str:
    """Returns an example's caption in one line, without control characters; bytes that are not UTF-8 are replaced.

    Raises:
      UserError: if the example has no caption.
    """
    if "caption" not in example:
        raise UserError("these images have no captions; leave config.captions out")
    caption = example["caption"]
    text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else caption
    return " ".join(UNPRINTABLE.sub(" ", text).split())
