"""Images as training reads them: one that cannot be read is named, counted and replaced."""

import itertools
import threading
from collections.abc import Iterator

from arrag_jax.data.examples import BadImage, Example, Images, most_bad
from arrag_jax.errors import UserError, printable
from arrag_jax.progress import tell


class ReadableImages:
    """A split without gaps: in the place of an image that cannot be read stands the next one that can.

    What stands where depends on the files alone, so that the loader's order is the same in every run, resumed ones
    included. An unreadable image is named on stderr when it is met first. Read from several threads.

    Args:
      images: of a split.
      most, least: how many may be unreadable; ``most_bad``'s ``share`` and ``least``.

    Raises:
      UserError: when more images are unreadable.
    """

    def __init__(self, images: Images, most: float, least: int):
        self.images, self.most, self.least = images, most, least
        self._bad: dict[int, str] = {}  # number → line
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """The example of this number, or of the next number whose image can be read."""
        numbers = itertools.chain(range(index, len(self)), range(index))
        return next(example for example in map(self._read, numbers) if example is not None)

    def first(self, count: int) -> Iterator[Example]:
        """Yields the readable ones among the first ``count`` images."""
        return (example for example in map(self._read, range(min(count, len(self)))) if example is not None)

    def _read(self, number: int) -> Example | None:
        if number in self._bad:
            return None
        try:
            return self.images[number]
        except BadImage as reason:
            self._note(number, f"{self.images.source_id(number)}: {printable(str(reason))}")
            return None

    def _note(self, number: int, line: str) -> None:
        """Counts an unreadable image, and names it where no other thread has."""
        with self._lock:
            if number not in self._bad:
                tell(f"skipped {line}")
            self._bad[number] = line
            found, total = len(self._bad), len(self)
            first = "; ".join(list(self._bad.values())[:3]) + (" …" if found > 3 else "")
        if found == total:
            raise UserError(f"none of the {total:,} images can be read ({first}); is config.data.source right?")
        if found > most_bad(total, self.most, self.least):
            raise UserError(
                f"{found:,} of {total:,} images cannot be read ({first}), more than config.data.max_bad_fraction="
                f"{self.most:g} allows; raise it, or mend them, and run the same command again"
            )
