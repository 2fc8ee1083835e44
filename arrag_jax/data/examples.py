"""What an image source gives: examples by number, and the reasons why one cannot be given."""

from typing import Any, Protocol, runtime_checkable

from arrag_jax.errors import UNPRINTABLE, UserError

Example = dict[str, Any]
# How the reason of a line in a file of bad images begins that tells of no damage: what may be an image and is not read,
# and an image that is there already. Both are left out, and neither counts among those that cannot be read.
PASSED_OVER, DUPLICATE = "passed over: ", "duplicate of "


class BadImage(UserError):
    """An image that cannot be had; the message is the reason, the one who asked knows the name."""


@runtime_checkable
class Examples(Protocol):
    """A random-access source of dicts with "image", uint8 [h, w, 3], all of one size; read from several threads.

    An image that can never be had raises ``BadImage``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


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
