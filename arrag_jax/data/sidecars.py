"""Finds the caption file of an image, and reads the caption from it; JSON files may state its rights, too.

Names follow webdataset and img2dataset: an image and its caption have the same name up to the first dot of the base
name, so ``a.txt`` is the caption of ``a.jpg`` and of ``a.left.jpg``. More exact names come first: for ``a.left.jpg``
they are ``a.left.jpg.txt``, then ``a.left.txt``, then ``a.txt``. Among files with the same name, text comes before
JSON. The first file that holds a caption is used; an empty file holds none. The case of the ending does not matter.

The caption in a text file is its first line that is not blank. The caption in a JSON file is the value if that is a
string, else the value of "caption", else of "text"; in a list, the first caption is used. Files are UTF-8, or UTF-16
with a byte order mark.
"""

import codecs
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from arrag_jax.data.stated_rights import UNSTATED, Rights, rights_of
from arrag_jax.json_files import parse_json

TEXTS, JSONS = (".txt", ".text", ".caption"), (".json", ".jsn")
KEYS = ("caption", "text")  # keys of a JSON object that may hold a caption, in this order
LONGEST_TEXT, LONGEST_JSON = 2**14, 2**20  # most bytes that are read from a file
Read = Callable[[str, int], bytes]  # (name of a file, maximum number of bytes) → its first bytes
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Sidecars:
    """The files of a folder or a tar that may hold captions."""

    def __init__(self) -> None:
        self.names: dict[str, list[tuple[int, str, str]]] = {}  # name without ending → rank, ending, name

    def add(self, name: str) -> None:
        """Adds a file; a file that cannot hold a caption is ignored."""
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
        """Returns an image's caption in one line ("" = none), and why a caption file cannot be read ("" = no error)."""
        fault = ""
        for name in self.of(image):
            try:
                if found := _caption_in(name, read):
                    return found, ""
            except (OSError, ValueError) as error:  # a UserError is a ValueError
                fault = fault or f"its caption in {name} cannot be read: {getattr(error, 'strerror', None) or error}"
        return "", fault

    def rights(self, image: str, read: Read) -> tuple[Rights, str]:
        """Returns what the first JSON file of an image that states rights says, and why one cannot be read."""
        fault = ""
        for name in self.of(image):
            try:
                record = _in_file(name, read) if name.lower().endswith(JSONS) else None
                if isinstance(record, dict) and any(found := rights_of(record)):
                    return found, ""
            except (OSError, ValueError) as error:  # a UserError is a ValueError
                fault = fault or f"its rights in {name} cannot be read: {getattr(error, 'strerror', None) or error}"
        return UNSTATED, fault


def _in_file(name: str, read: Read) -> Any:
    """Returns the value in a JSON file, None if the file is empty; errors as in ``_caption_in``."""
    data = read(name, LONGEST_JSON + 1)
    if len(data) > LONGEST_JSON:
        raise ValueError(f"it is longer than {LONGEST_JSON:,} bytes")
    # The files of large data sets hold NaN for missing numbers.
    return parse_json(_decoded(data, True), "it", constants=True) if data.strip() else None


def _caption_in(name: str, read: Read) -> str:
    """Returns the caption in a file, "" if there is none.

    Raises:
      ValueError: if the file cannot be read as a caption file.
    """
    if name.lower().endswith(JSONS):
        return _in_json(_in_file(name, read))
    data = read(name, LONGEST_TEXT + 1)
    whole = len(data) <= LONGEST_TEXT
    line = next((x for x in _decoded(data, whole).splitlines(keepends=True) if x.strip()), "")
    if not whole and line == "".join(line.splitlines()):
        raise ValueError(f"its first line is longer than {LONGEST_TEXT:,} bytes")
    if "\0" in line:
        raise ValueError("it is no text")
    return line.strip()


def _decoded(data: bytes, whole: bool) -> str:
    """Returns the decoded text; if ``data`` is not the whole file, an incomplete last character is dropped."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    return codecs.getincrementaldecoder(_MARKS.get(mark, "utf-8"))().decode(data, whole).removeprefix("\ufeff")


def _in_json(value: Any, depth: int = 3) -> str:
    """Returns the first caption in a JSON value that is nested at most ``depth`` levels, "" if there is none."""
    if value is None or (isinstance(value, list | dict) and not depth):
        return ""
    if isinstance(value, list):
        return next(filter(None, (_in_json(held, depth - 1) for held in value)), "")
    if isinstance(value, dict):
        named = {key.lower(): held for key, held in reversed(value.items())}
        return next(filter(None, (_in_json(named[key], depth - 1) for key in KEYS if key in named)), "")
    if not isinstance(value, str):
        raise ValueError('its "caption" is no text')
    value.encode()  # raises on a lone surrogate, which cannot be written as UTF-8
    return value.strip()
