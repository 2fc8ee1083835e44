"""The images that a build leaves out: listed beside their shard; of those that cannot be read, no more than allowed.

A bad image, which cannot be read, is said at once and counts in what is allowed. What is passed over, and duplicates of
images that are there, are listed alike and are no bad images.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, BadImage, most_bad
from arrag_jax.errors import UserError, printable
from arrag_jax.progress import Bar, tell
from arrag_jax.store import building
from arrag_jax.store.left_out import BAD_FILES, read_bad
from arrag_jax.store.shards import ShardSettings


class SkippedCounts(NamedTuple):
    """Images gone through, without what is passed over, and the bad ones among them."""

    images: int
    bad: int


NONE = SkippedCounts(0, 0)


def is_bad(reason: str) -> bool:
    """Whether an image that is left out for this reason cannot be read."""
    return not reason.startswith((PASSED_OVER, DUPLICATE))


@dataclasses.dataclass(frozen=True)
class SkippedImages:
    """Those of one build.

    Attributes:
      directory, settings: what is built.
      source_id: image number → one line that tells where it came from.
      most: share of bad images above which the build fails.
      least: as of ``data.examples.most_bad``.
      others: images of the folder that the built one is to be a part of; they count in that share.
    """

    directory: Path
    settings: ShardSettings
    source_id: Callable[[int], str]
    most: float
    least: int = 0
    others: SkippedCounts = NONE

    def __post_init__(self):
        if not 0 <= self.most <= 1:
            raise UserError(f"max_bad_fraction={self.most} is outside [0, 1]")

    def of_shard(self, shard: int, bar: Bar) -> tuple[dict[int, str], Callable[[int, BadImage], None]]:
        """Begins a shard: its bad images (number → line), and whom to tell of each (``encoding.encoded``)."""
        # A killed run's file: what was bad then may be good by now.
        (self.directory / self.settings.bad_file(shard)).unlink(missing_ok=True)
        bad: dict[int, str] = {}

        def skip(number: int, reason: BadImage) -> None:
            bad[number] = self.line(number, str(reason))
            if is_bad(str(reason)):
                tell(f"skipped {printable(self.source_id(number))}: {printable(reason)}")
            bar.update()

        return bad, skip

    def line(self, number: int, reason: str) -> str:
        """The line of an image in a file of bad ones."""
        return f"{self.source_id(number)}\t{printable(reason)}"

    def write(self, shard: int, bad: dict[int, str]) -> list[str]:
        """Writes a shard's bad images, which is to be done before its last file; returns the ids of the good ones."""
        if bad:
            building.write_lines(
                self.directory / self.settings.bad_file(shard), [bad[number] for number in sorted(bad)]
            )
        return [self.source_id(number) for number in self.settings.shard_images(shard) if number not in bad]

    def require_few(self) -> None:
        """Raises UserError if too large a share of all images, with the others, is known to be bad."""
        left_out = [line for path in sorted(self.directory.glob(BAD_FILES)) for line in read_bad(path)]
        bad = [(name, reason) for name, reason in left_out if is_bad(reason)]
        found = len(bad) + self.others.bad
        passed_over = sum(reason.startswith(PASSED_OVER) for _, reason in left_out)
        total = self.settings.num_images - passed_over + self.others.images
        first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3]) + (" …" if len(bad) > 3 else "")
        if found and found == total:
            raise UserError(f"none of the {total:,} images can be read ({first}); is config.source right?")
        if found > most_bad(total, self.most, self.least):
            raise UserError(
                f"{found:,} of {total:,} images cannot be read ({first}), more than config.max_bad_fraction="
                f"{self.most:g} allows; raise it, or mend them, delete {self.directory} and run the same command again"
            )
