"""What an image source gives: examples by number, and the reasons why one cannot be given."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from arrag_jax.errors import UNPRINTABLE, UserError

Example = dict[str, Any]
# How the reason of a line in a file of bad images begins that tells of no damage: what may be an image and is not read,
# and an image that is there already. Both are left out, and neither counts among those that cannot be read.
PASSED_OVER, DUPLICATE = "passed over: ", "duplicate of "
ONE_IN = 20  # images; among fewer than this many times the least number of bad ones that is allowed is smaller


class BadImage(UserError):
    """An image that cannot be had; the message is the reason, the one who asked knows the name."""


@runtime_checkable
class Examples(Protocol):
    """A random-access source of dicts with "image", uint8 [h, w, 3], all of one size; read from several threads.

    An image that can never be had raises ``BadImage``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Images(Examples, Protocol):
    """The examples of one split. All have names, and captions where these were asked for."""

    def source_id(self, index: int) -> str:
        """The id of an image: one line of text that no other image of the source has."""
        ...

    def caption(self, index: int) -> str:
        """Returns an image's caption in one line ("" = it has none) and decodes no pixels.

        Raises:
          BadImage: it is known already that the image cannot be had.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Where images come from: a folder, a tar or a data set; ``data.registry.open_source`` makes one.

    Attributes:
      words: every word of its captions, where that is known without reading them (each image then has a caption); else
        None.
      identity: changes with the images or their captions; "" where the source's name alone tells what they are.
    """

    @property
    def words(self) -> tuple[str, ...] | None: ...

    @property
    def identity(self) -> str: ...

    def images(self, split: str) -> Images:
        """Returns the images of a split or of a slice of one ("train[:100]"), or raises UserError if there are none."""
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
        """The id of an image."""
        return self._images.source_id(self._numbers[index])

    def caption(self, index: int) -> str:
        """The caption of an image."""
        return self._images.caption(self._numbers[index])


def most_bad(total: int, share: float, least: int) -> int:
    """Returns how many of ``total`` images may be unreadable.

    Args:
      share: of all images.
      least: so many are allowed whatever their share is, as long as they are at most one in ``ONE_IN`` (or one in all).
    """
    return int(max(share * total, min(least, max(1, total // ONE_IN))))


def caption_of(example: Example) -> str:
    """An example's caption in one line; control characters and bytes that are not UTF-8 are no words.

    Raises:
      UserError: it has none.
    """
    if "caption" not in example:
        raise UserError("these images have no captions; leave config.captions out")
    caption = example["caption"]
    text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else caption
    return " ".join(UNPRINTABLE.sub(" ", text).split())
