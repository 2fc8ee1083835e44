"""Captions that stand in files beside images: which file is an image's, and what it says.

As webdataset and img2dataset name them: an image and its caption have the same name up to the first dot of the base
name, so that ``a.txt`` is the caption of ``a.jpg`` and of ``a.left.jpg``. The more exact name wins: ``a.left.jpg`` asks
for ``a.left.jpg.txt``, then ``a.left.txt``, then ``a.txt``. Among files of one name text comes before JSON. The first
one that holds a caption counts; an empty one is none. Capitals in the ending do not matter.

A text's caption is its first line that is not blank; a JSON's is a string, or its "caption", else its "text" (of a list
the first). Text is UTF-8, or UTF-16 with a byte order mark.
"""

import codecs
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from arrag_jax.json_files import parse_json

TEXTS, JSONS = (".txt", ".text", ".caption"), (".json", ".jsn")
KEYS = ("caption", "text")  # of a JSON object, in this order
LONGEST_TEXT, LONGEST_JSON = 2**14, 2**20  # bytes that are read of a file
Read = Callable[[str, int], bytes]  # name of a file, how many bytes at most → its first bytes
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Sidecars:
    """The files of a folder, or of a tar, that may hold captions."""

    def __init__(self) -> None:
        self.names: dict[str, list[tuple[int, str, str]]] = {}  # name without ending → rank, ending, name

    def add(self, name: str) -> None:
        """Takes note of a file; one that can hold no caption is ignored."""
        suffix = PurePosixPath(name).suffix
        if suffix.lower() in (*TEXTS, *JSONS):
            rank = (*TEXTS, *JSONS).index(suffix.lower())
            self.names.setdefault(name.removesuffix(suffix), []).append((rank, suffix.swapcase(), name))

    def of(self, image: str) -> Iterator[str]:
        """Yields the files that may hold an image's caption, the most exact name first."""
        folder, slash, stem = image.rpartition("/")
        while True:
            yield from (name for _, _, name in sorted(self.names.get(f"{folder}{slash}{stem}", [])))
            shorter = stem.rpartition(".")[0]
            if not shorter:
                return
            stem = shorter

    def caption(self, image: str, read: Read) -> tuple[str, str]:
        """Returns an image's caption in one line ("" = it has none), and why a file that should hold it does not."""
        fault = ""
        for name in self.of(image):
            try:
                if found := _caption_in(name, read):
                    return found, ""
            except (OSError, ValueError) as error:  # UserErrors are ValueErrors
                fault = fault or f"its caption in {name} cannot be read: {getattr(error, 'strerror', None) or error}"
        return "", fault


def _caption_in(name: str, read: Read) -> str:
    """The caption that a file holds, "" if none; a ValueError if it should and cannot be had."""
    if name.lower().endswith(JSONS):
        data = read(name, LONGEST_JSON + 1)
        if len(data) > LONGEST_JSON:
            raise ValueError(f"it is longer than {LONGEST_JSON:,} bytes")
        # NaN stands in the files of large sets where a number is missing
        return _in_json(parse_json(_decoded(data, True), "it", constants=True)) if data.strip() else ""
    data = read(name, LONGEST_TEXT + 1)
    whole = len(data) <= LONGEST_TEXT
    line = next((x for x in _decoded(data, whole).splitlines(keepends=True) if x.strip()), "")
    if not whole and line == "".join(line.splitlines()):
        raise ValueError(f"its first line is longer than {LONGEST_TEXT:,} bytes")
    if "\0" in line:
        raise ValueError("it is no text")
    return line.strip()


def _decoded(data: bytes, whole: bool) -> str:
    """The text; of one that is not whole, without a last character that was cut."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    return codecs.getincrementaldecoder(_MARKS.get(mark, "utf-8"))().decode(data, whole).removeprefix("\ufeff")


def _in_json(value: Any, depth: int = 3) -> str:
    """The first caption in a JSON value, no deeper than this."""
    if value is None or (isinstance(value, list | dict) and not depth):
        return ""
    if isinstance(value, list):
        return next(filter(None, (_in_json(held, depth - 1) for held in value)), "")
    if isinstance(value, dict):
        named = {key.lower(): held for key, held in reversed(value.items())}
        return next(filter(None, (_in_json(named[key], depth - 1) for key in KEYS if key in named)), "")
    if not isinstance(value, str):
        raise ValueError('its "caption" is no text')
    value.encode()  # half a surrogate pair cannot be written
    return value.strip()
