"""Images for training: an image that cannot be read is reported, counted and replaced by another."""

import itertools
import threading
from collections.abc import Iterator

from arrag_jax.data.examples import BadImage, Example, Images, most_bad
from arrag_jax.errors import UserError, printable
from arrag_jax.progress import tell


class ReadableImages:
    """The images of a split, in which the next readable image replaces an unreadable one.

    The replacement depends on the files only, so the loader's order is the same in every run, including resumed runs.
    An unreadable image is reported on stderr once. Several threads may read at the same time.

    Args:
      images: the images of the split.
      most, least: limit of unreadable images: ``share`` and ``least`` of ``most_bad``.

    Raises:
      UserError: if more images are unreadable; raised while reading.
    """

    def __init__(self, images: Images, most: float, least: int):
        self.images, self.most, self.least = images, most, least
        self._bad: dict[int, str] = {}  # number of an image → its line in the report
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """Returns the example with this number, or the next one whose image can be read."""
        numbers = itertools.chain(range(index, len(self)), range(index))
        return next(example for example in map(self._read, numbers) if example is not None)

    def first(self, count: int) -> Iterator[Example]:
        """Yields the readable examples among the first ``count`` images."""
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
        """Counts an unreadable image, and reports it unless another thread has done so."""
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
