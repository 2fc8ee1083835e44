"""The images that a build leaves out: said at once, listed beside their shard, and no more of them than allowed."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arrag_jax.errors import UserError
from arrag_jax.retrieval import building
from arrag_jax.retrieval.encoding import BadImage
from arrag_jax.retrieval.shards import BAD_FILES, ShardSettings, read_bad


class Tally(NamedTuple):
    """Images gone through, and the bad ones among them."""

    images: int
    bad: int


NONE = Tally(0, 0)


@dataclasses.dataclass(frozen=True)
class BadImages:
    """Those of one build.

    Attributes:
      directory, settings: what is built.
      source_id: image number → one line that tells where it came from.
      most: share of bad images above which the build fails.
      others: images of the folder that the built one is to be a part of; they count in that share.
    """

    directory: Path
    settings: ShardSettings
    source_id: Callable[[int], str]
    most: float
    others: Tally = NONE

    def __post_init__(self):
        if not 0 <= self.most <= 1:
            raise UserError(f"max_bad_fraction={self.most} is outside [0, 1]")

    def of_shard(self, shard: int, bar: tqdm) -> tuple[dict[int, str], Callable[[int, BadImage], None]]:
        """Begins a shard: its bad images (number → line), and whom to tell of each (``encoding.encoded``)."""
        # A killed run's file: what was bad then may be good by now.
        (self.directory / self.settings.bad_file(shard)).unlink(missing_ok=True)
        bad: dict[int, str] = {}

        def skip(number: int, reason: BadImage) -> None:
            bad[number] = f"{self.source_id(number)}\t{reason}"
            bar.write(f"skipped {self.source_id(number)}: {reason}", file=sys.stderr)
            bar.update()

        return bad, skip

    def write(self, shard: int, bad: dict[int, str]) -> list[str]:
        """Writes a shard's bad images, which is to be done before its last file; returns the ids of the good ones."""
        if bad:
            building.write_lines(self.directory / self.settings.bad_file(shard), bad.values())
        return [self.source_id(number) for number in self.settings.shard_images(shard) if number not in bad]

    def require_few(self) -> None:
        """Raises UserError if too large a share of all images, with the others, is known to be bad."""
        bad = [line for path in sorted(self.directory.glob(BAD_FILES)) for line in read_bad(path)]
        found, total = len(bad) + self.others.bad, self.settings.num_images + self.others.images
        first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3]) + (" …" if len(bad) > 3 else "")
        if found == total:
            raise UserError(f"none of the {total:,} images can be read ({first}); is config.source right?")
        if found > self.most * total:
            raise UserError(
                f"{found:,} of {total:,} images cannot be read ({first}), more than config.max_bad_fraction="
                f"{self.most:g} allows; raise it, or mend them, delete {self.directory} and run the same command again"
            )
