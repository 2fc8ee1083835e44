"""The images of a source as it lists them, and the file that keeps such a list."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from arrag_jax.data.examples import PASSED_OVER
from arrag_jax.errors import UserError, printable
from arrag_jax.files import atomic_write


class Entry(NamedTuple):
    """One image of a source, readable or not.

    Attributes:
      id: one line of text, see the module's docstring.
      path: path of the file that holds it, relative to the source's root.
      offset, size: where its bytes are in that file; in a Parquet file, offset is the number of its row.
      fault: the reason why it cannot be read, if that is already known.
      caption: its caption, if captions were requested.
      licence, source: its rights, if they were requested.
      column: the column that holds it in a Parquet file; "" = it is in another kind of file.
    """

    id: str
    path: str
    offset: int = 0
    size: int = 0
    fault: str = ""
    caption: str = ""
    column: str = ""
    licence: str = ""
    source: str = ""

    @property
    def order(self) -> str:
        """What entries are sorted by: the id; the rows of a Parquet file keep their order."""
        return f"{self.path}!{self.offset:012d}" if self.column else self.id

    @property
    def is_passed_over(self) -> bool:
        """Whether it may be an image that we do not read; it is not damaged."""
        return self.fault.startswith(PASSED_OVER)


class Listing(NamedTuple):
    """The content of a source.

    Attributes:
      entries: its images, readable or not, in order.
      beside: ending → number of files that hold no image.
    """

    entries: list[Entry]
    beside: dict[str, int]


def save_listing(path: Path, entries: Iterable[Entry], beside: dict[str, int] | None = None) -> None:
    """Writes a listing atomically: one JSON array per entry and line, then ``beside``, if given, as a JSON object."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.writelines(f"{json.dumps(entry)}\n" for entry in (*entries, *filter(None, [beside])))


def load_listing(path: Path) -> list[Entry]:
    """Returns the entries of ``load_whole_listing``."""
    return load_whole_listing(path).entries


def load_whole_listing(path: Path) -> Listing:
    """Returns the listing in a file.

    Raises:
      UserError: if the file is missing or damaged.
    """
    try:
        with open(path, encoding="ascii") as file:
            lines = [json.loads(line) for line in file]
        beside = lines.pop() if lines and isinstance(lines[-1], dict) else {}
        return Listing([Entry(*line) for line in lines], beside)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: it lists an unfinished build's images; choose another --workdir"
        ) from error


def with_clean_id(entry: Entry) -> Entry:
    """Returns the entry with an id and a fault that are one line of text; an id that had to be changed is a fault."""
    clean, fault = printable(entry.id), printable(entry.fault)
    if clean == entry.id:
        return entry._replace(fault=fault)
    return entry._replace(id=clean, fault=fault or "its name holds control characters or is not UTF-8; rename it")
