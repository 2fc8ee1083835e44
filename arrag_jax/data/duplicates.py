"""Finds the images of a source that have the same bytes."""

import collections
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arrag_jax.data.examples import DUPLICATE, BadImage
from arrag_jax.data.sources import LARGEST, Entry, read_entry

PROBE = 2**12  # bytes at each end that are compared first, before images of the same size are read completely


def without_copies(root: Path, entries: list[Entry]) -> list[Entry]:
    """Returns the entries, with a fault in each entry that has the same bytes and caption as an earlier one.

    Only images with the same size and caption are read; their ends are compared first. An image that cannot be read
    counts as no copy.
    """
    twins = _groups([(entry.size, entry.caption) for entry in entries], range(len(entries)))
    for first_bytes in (PROBE, LARGEST):
        alike = sorted(i for group in twins for i in group)  # in order, as Parquet files are read by groups of rows
        digests = {i: _digest(root, entries[i], first_bytes) for i in alike if not entries[i].fault and entries[i].size}
        twins = _groups([digests.get(i) for i in range(len(entries))], digests)
    found = list(entries)
    for first, *others in twins:
        for i in others:
            found[i] = entries[i]._replace(fault=f"{DUPLICATE}{entries[first].id}")
    return found


def _groups(facts: list[Any], numbers: Iterable[int]) -> list[list[int]]:
    """Returns groups of two or more numbers that have the same fact; numbers whose fact is None are in no group."""
    groups = collections.defaultdict(list)
    for number in sorted(numbers):
        if facts[number] is not None:
            groups[facts[number]].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _digest(root: Path, entry: Entry, end_bytes: int) -> tuple[int, str, bytes] | None:
    """Returns size, caption and a hash of an image's first and last bytes; None if the image cannot be read."""
    spans = [(0, end_bytes)] if 2 * end_bytes >= entry.size else [(0, end_bytes), (entry.size - end_bytes, end_bytes)]
    content = hashlib.blake2b(digest_size=16)
    if entry.column:
        try:
            data = read_entry(root, entry)
        except BadImage:
            return None
        for start, length in spans:
            content.update(data[start : start + length])
        return entry.size, entry.caption, content.digest()
    try:
        with open(root / entry.path, "rb") as file:
            for start, length in spans:
                file.seek(entry.offset + start)
                left = min(length, entry.size - start)
                while left > 0 and (data := file.read(min(left, 2**20))):
                    content.update(data)
                    left -= len(data)
    except OSError:
        return None
    return entry.size, entry.caption, content.digest()
