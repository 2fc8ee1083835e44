"""The files that tell which images of a shard were left out, one a line: the image, a tab, and why."""

from pathlib import Path

from arrag_jax.data.examples import DUPLICATE, PASSED_OVER

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
