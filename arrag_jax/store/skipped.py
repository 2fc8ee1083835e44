"""The images that a build leaves out: the files that list them, and the limit of bad images.

The file of a shard has one line per image: its id, a tab, and the reason. A bad image cannot be read, and counts
towards the limit. Images that are passed over and duplicates of stored images are listed in the same file, but are not
bad images.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, most_bad
from arrag_jax.errors import UserError

BAD_FILES = "bad-*.txt"
LEFT_OUT = ("bad", "passed_over", "duplicates")  # the counts that a manifest holds for such a file


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file in which every line ends in a newline."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def read_bad(path: Path) -> list[tuple[str, str]]:
    """Returns (image id, reason) for each line of a file of images left out."""
    return [bad_line(line) for line in read_lines(path)]


def bad_line(line: str) -> tuple[str, str]:
    """Returns (image id, reason) from one line of a file of images left out."""
    name, _, reason = line.partition("\t")
    return name, reason


def counts_of(reasons: list[str]) -> dict[str, int]:
    """Returns the manifest's counts for a file of images left out: bad ones, ones passed over, and duplicates."""
    passed, same = (sum(reason.startswith(kind) for reason in reasons) for kind in (PASSED_OVER, DUPLICATE))
    counts = {"images": 0, "bad": len(reasons) - passed - same}
    return counts | {name: count for name, count in (("passed_over", passed), ("duplicates", same)) if count}


def is_bad(reason: str) -> bool:
    """Returns whether an image that is left out for this reason is a bad image."""
    return not reason.startswith((PASSED_OVER, DUPLICATE))


class SkippedCounts(NamedTuple):
    """The number of images processed, without those passed over, and the number of bad ones among them."""

    images: int
    bad: int


@dataclasses.dataclass(frozen=True)
class SkipLimit:
    """The limit of bad images in a build.

    Attributes:
      max_bad_fraction: the build fails if a larger share of the images is bad.
      min_bad: this many bad images are allowed even if their share is larger; see ``data.examples.most_bad``.
      elsewhere: counts of the store that receives the new segment; they are included in the share.
    """

    max_bad_fraction: float = 0.0
    min_bad: int = 0
    elsewhere: SkippedCounts = SkippedCounts(0, 0)

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction={self.max_bad_fraction} is outside [0, 1]")

    def require_few(self, directory: Path, num_images: int) -> None:
        """Raises UserError if the files in ``directory`` list too many bad images.

        Args:
          directory: the folder of the build.
          num_images: number of images that the build processes.
        """
        left_out = [line for path in sorted(directory.glob(BAD_FILES)) for line in read_bad(path)]
        bad = [(name, reason) for name, reason in left_out if is_bad(reason)]
        found = len(bad) + self.elsewhere.bad
        passed_over = sum(reason.startswith(PASSED_OVER) for _, reason in left_out)
        total = num_images - passed_over + self.elsewhere.images
        first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3]) + (" …" if len(bad) > 3 else "")
        if found and found == total:
            raise UserError(f"none of the {total:,} images can be read ({first}); is config.source right?")
        if found > most_bad(total, self.max_bad_fraction, self.min_bad):
            raise UserError(
                f"{found:,} of {total:,} images cannot be read ({first}), more than config.max_bad_fraction="
                f"{self.max_bad_fraction:g} allows; raise it, or mend them, delete {directory} and run the same "
                "command again"
            )


NO_BAD = SkipLimit()  # no image may be bad
