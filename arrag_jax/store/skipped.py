"""The images that a build leaves out: the files that list them, and how many of them may be unreadable.

A shard's file lists one image a line: the image, a tab, and why it is left out. A bad image, which cannot be read,
counts in what is allowed. What is passed over, and duplicates of images that are there, are listed alike and are no bad
images.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, most_bad
from arrag_jax.errors import UserError

BAD_FILES = "bad-*.txt"
LEFT_OUT = ("bad", "passed_over", "duplicates")  # what a manifest counts in such a file


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of ours, each of which ends in a newline."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def read_bad(path: Path) -> list[tuple[str, str]]:
    """Image and reason from each line of a file of bad images."""
    return [bad_line(line) for line in read_lines(path)]


def bad_line(line: str) -> tuple[str, str]:
    """Image and reason from a line of a file of bad images."""
    name, _, reason = line.partition("\t")
    return name, reason


def counts_of(reasons: list[str]) -> dict[str, int]:
    """What the manifest says of a file of bad images with these reasons; what is passed over and duplicates apart."""
    passed, same = (sum(reason.startswith(kind) for reason in reasons) for kind in (PASSED_OVER, DUPLICATE))
    counts = {"images": 0, "bad": len(reasons) - passed - same}
    return counts | {name: count for name, count in (("passed_over", passed), ("duplicates", same)) if count}


def is_bad(reason: str) -> bool:
    """Whether an image that is left out for this reason cannot be read."""
    return not reason.startswith((PASSED_OVER, DUPLICATE))


class SkippedCounts(NamedTuple):
    """Images gone through, without what is passed over, and the bad ones among them."""

    images: int
    bad: int


@dataclasses.dataclass(frozen=True)
class SkipLimit:
    """How many images of a build may be bad.

    Attributes:
      max_bad_fraction: share of bad images above which the build fails.
      min_bad: so many do not fail it; see ``data.examples.most_bad``.
      elsewhere: images of the store that the built one is to be a segment of; they count in that share.
    """

    max_bad_fraction: float = 0.0
    min_bad: int = 0
    elsewhere: SkippedCounts = SkippedCounts(0, 0)

    def __post_init__(self):
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction={self.max_bad_fraction} is outside [0, 1]")

    def require_few(self, directory: Path, num_images: int) -> None:
        """Raises UserError if the files of bad images in ``directory``, which goes through so many, list too many."""
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


NO_BAD = SkipLimit()  # not one image may be bad
