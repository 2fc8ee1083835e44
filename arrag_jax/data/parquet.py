"""Reads images and captions from Parquet files, one row group at a time.

A column holds one image per row: bytes, or a struct with a field "bytes", as data sets of the hub have. Which columns
are read is configured (``config.ColumnsConfig``) or follows from the names that such files usually have. A Parquet file
without a column of images is a side file, as img2dataset writes beside its shards: it may give captions by key.

pyarrow is imported when the first Parquet file is opened.
"""

import bisect
import collections
import functools
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from arrag_jax.config import ColumnsConfig
from arrag_jax.data.examples import LASTING, BadImage
from arrag_jax.data.parquet_text import caption_text, text
from arrag_jax.data.stated_rights import LICENCE, SOURCE, UNSTATED, Rights, rights_of
from arrag_jax.errors import UserError, printable

SUFFIX = ".parquet"
# Names that the columns have unless the config says otherwise, in any case; the first one that is there is read.
IMAGES, CAPTIONS, KEYS = ("image", "jpg", "png", "jpeg", "webp"), ("caption", "text", "prompt"), ("key", "__key__")
STATUS = "status"  # img2dataset's reason for a row without an image
FOOTER = 2**26  # most bytes of the description at a file's end, which names every column of every row group
MOST_FAULTS = 2**16  # most rows of one damaged row group that are listed; its number of rows may be damaged, too
SHOWN = 12  # columns that a message lists
KEPT = 2**26  # bytes of row groups that stay in memory; the last two groups always stay


class ParquetError(ValueError):
    """A Parquet file cannot be read; the message is the reason alone."""


class Columns(NamedTuple):
    """The columns of one file that are read; "" = the file has none of this kind.

    Attributes:
      image: the column of the images' bytes; of a struct, "NAME.bytes".
      caption, key, status: caption, name and reason of absence of an image.
      licence, source: its rights.
    """

    image: str
    caption: str
    key: str
    status: str
    licence: str
    source: str


class Row(NamedTuple):
    """One row of a file.

    Attributes:
      number: counted from the start of the file.
      key: its name; "" = it has none.
      size: bytes of the image; None = there is no image.
      caption: its caption in one line, "" if there is none.
      fault: why the row cannot be read; where there is no image, the reason, if one is known.
    """

    number: int
    key: str
    size: int | None
    caption: str
    fault: str
    rights: Rights = UNSTATED


class Description(NamedTuple):
    """What the end of a file says about it.

    Attributes:
      path: the file.
      stamp: its size in bytes and the time of its last change.
      metadata: pyarrow's ``FileMetaData``.
      starts: number of the first row of each row group, and the number of all rows.
    """

    path: Path
    stamp: tuple[int, int]
    metadata: Any
    starts: list[int]


def describe(path: Path) -> Description:
    """Returns the description of a file; raises ``ParquetError`` if there is none or it is too large."""
    try:
        facts = os.stat(path)
        return _described(path, (facts.st_size, facts.st_mtime_ns))
    except OSError as error:
        raise _failure(error, path, "unreadable: ") from error


@functools.lru_cache(maxsize=32)
def _described(path: Path, stamp: tuple[int, int]) -> Description:
    import pyarrow.parquet

    with open(path, "rb") as file:
        size = stamp[0]
        file.seek(max(0, size - 8))
        end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if size < 12 or end[4:] != b"PAR1":
        raise ParquetError("not a whole Parquet file: its end is missing; copy it again")
    if length > FOOTER:
        raise ParquetError(
            f"its description takes {length:,} bytes, more than {FOOTER:,}: too many columns or row groups; write it "
            "again with the columns that are needed"
        )
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failure(error, path, "not a whole Parquet file: ") from error
    counts = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return Description(path, stamp, metadata, [0, *itertools.accumulate(counts)])


class Table:
    """An opened file: its columns and row groups, and its rows in order.

    Raises:
      ParquetError: if it is no Parquet file, is cut off, or lacks a column that the config names.
    """

    def __init__(self, path: Path, config: ColumnsConfig):
        self.path, self.about = path, describe(path)
        try:
            self.schema = self.about.metadata.schema.to_arrow_schema()
        except Exception as error:  # pyarrow raises several types for damaged descriptions
            raise ParquetError(f"its columns cannot be read: {_said(error)}") from error
        self.columns = self._chosen(config)

    @property
    def names(self) -> str:
        """The names of the file's columns with their types, for messages."""
        listed = [f"{field.name} ({_type_name(field.type)})" for field in list(self.schema)[:SHOWN]]
        more = len(self.schema) - len(listed)
        return printable(", ".join(listed) + (f" and {more:,} more" if more else ""))

    def rows(self, captions: bool, rights: bool = False) -> Iterator[Row]:
        """Yields every row; the images' bytes are read, because only they tell which rows have one.

        Args:
          captions, rights: whether to read captions, and licences and sources.
        """
        left = {} if rights else {"licence": "", "source": ""}
        columns = self.columns._replace(**left, **({} if captions else {"caption": ""}))
        wanted = [name for name in columns if name]
        for group, (number, end) in enumerate(itertools.pairwise(self.about.starts)):
            count = end - number
            try:
                table = read_group(self.about, group, wanted)
                if table.num_rows != count:
                    raise ParquetError(f"it holds {table.num_rows} rows, not {count}")
                yield from self._rows_of(table, number, columns)
            except ParquetError as error:
                fault = f"row group {group} cannot be read: {error}"
                yield from (Row(number + i, "", 0, "", fault) for i in range(min(count, MOST_FAULTS)))

    def captions_by_key(self) -> dict[str, str]:
        """Returns key → caption of a side file; {} if it has no such columns or cannot be read."""
        columns, found = self.columns, {}
        if not (columns.caption and columns.key):
            return {}
        for group in range(self.about.metadata.num_row_groups):
            try:
                table = read_group(self.about, group, [columns.caption, columns.key])
            except ParquetError:
                continue
            pairs = zip(table.column(columns.key), table.column(columns.caption), strict=True)
            found.update({text(key): caption_text(caption) for key, caption in pairs})
        return found

    def _chosen(self, config: ColumnsConfig) -> Columns:
        """Returns the columns to read."""
        usual = [name for name in IMAGES if self._image(self._named("", (name,), ""))]
        image = self._named(config.image, tuple(usual), "image")
        if config.image and not self._image(image):
            kind = _type_name(self.schema.field(image).type)
            raise ParquetError(
                f"column {image} (config.columns.image) holds {kind}, not the bytes of one image per row"
            )
        return Columns(
            self._image(image),
            self._named(config.caption, CAPTIONS, "caption"),
            self._named(config.key, KEYS, "key"),
            self._named("", (STATUS,), ""),
            self._named("", LICENCE, ""),
            self._named("", SOURCE, ""),
        )

    def _image(self, name: str) -> str:
        """Returns the name of the bytes in a column, "NAME" or "NAME.bytes"; "" if it holds no bytes."""
        if not name:
            return ""
        kind = self.schema.field(name).type
        if _is_struct(kind) and kind.get_field_index("bytes") >= 0:
            name, kind = f"{name}.bytes", kind.field("bytes").type
        return name if _is_binary(kind) else ""

    def _named(self, given: str, usual: tuple[str, ...], setting: str) -> str:
        """Returns the name of a column: the given one, or the first usual one that is there; "" = none."""
        names = self.schema.names
        if given:
            if names.count(given) != 1:
                raise ParquetError(f"it has no column {given} (config.columns.{setting}); its columns are {self.names}")
            return given
        lowered = {name.lower(): name for name in reversed(names)}
        return next((lowered[name] for name in usual if name in lowered), "")

    def _rows_of(self, table: Any, first: int, columns: Columns) -> Iterator[Row]:
        import pyarrow.compute

        image = column_of(table, columns.image)
        sizes = pyarrow.compute.binary_length(image).to_pylist()

        def texts(name: str, convert: Any = text) -> list[str]:
            return [convert(value) for value in table.column(name)] if name else [""] * len(sizes)

        keys, status = texts(columns.key), texts(columns.status)
        words, licences, origins = texts(columns.caption, caption_text), texts(columns.licence), texts(columns.source)
        rows = zip(sizes, keys, words, status, licences, origins, strict=True)
        for i, (size, key, word, why, licence, origin) in enumerate(rows):
            rights = rights_of({"licence": licence, "source": origin})
            yield Row(first + i, key, size, word, why if size is None else "", rights)


def read_row(path: Path, column: str, number: int) -> bytes:
    """Returns the bytes of an image; neighbouring rows of the same row group come from memory.

    Args:
      column: as in ``Columns.image``.
      number: of the row in the file.

    Raises:
      BadImage: if the row is not there any more, or its row group is damaged.
      UserError: if reading failed for a reason that may be temporary.
    """
    try:
        about = describe(path)
        if number >= about.starts[-1]:
            raise BadImage("its row is not there any more")
        group = bisect.bisect_right(about.starts, number) - 1
        return _GROUPS.value(about, column, group, number - about.starts[group])
    except ParquetError as error:
        raise BadImage(str(error)) from error


def read_group(about: Description, group: int, columns: list[str]) -> Any:
    """Returns some columns of a row group as an Arrow table; raises ``ParquetError`` if it is damaged."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(about.path, metadata=about.metadata) as file:
            return file.read_row_group(group, columns=columns, use_threads=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failure(error, about.path) from error


def column_of(table: Any, name: str) -> Any:
    """Returns a column of an Arrow table, or the field of a struct that "NAME.FIELD" names."""
    import pyarrow.compute

    if name in table.column_names:
        return table.column(name)
    outer, _, inner = name.rpartition(".")
    return pyarrow.compute.struct_field(table.column(outer), inner)


class _Groups:
    """The columns of images that were read last, so that a row group is decoded once for all of its rows in turn."""

    def __init__(self) -> None:
        self._found: collections.OrderedDict[Any, Future] = collections.OrderedDict()
        self._lock = threading.Lock()

    def value(self, about: Description, column: str, group: int, row: int) -> bytes:
        """Returns the bytes in one row of a group; the threads that need a group wait for the one that reads it."""
        key = (about.path, about.stamp, column, group)
        with self._lock:
            reads = key not in self._found
            future = self._found.setdefault(key, Future())
            self._found.move_to_end(key)
        if reads:
            try:
                future.set_result(column_of(read_group(about, group, [column]), column))
            except BaseException as error:
                with self._lock:
                    self._found.pop(key, None)
                future.set_exception(error)
                raise
            self._shrink()
        value = future.result()[row].as_py()
        if value is None:
            raise BadImage("its row holds no image any more")
        return value

    def _shrink(self) -> None:
        """Forgets the groups that were used longest ago."""
        with self._lock:
            sizes = {key: x.result().nbytes for key, x in self._found.items() if x.done()}
            for key in list(sizes)[:-2]:
                if sum(sizes.values()) <= KEPT:
                    break
                del sizes[key], self._found[key]


_GROUPS = _Groups()


def _is_struct(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _type_name(kind: Any) -> str:
    return str(kind)[:60]


def _failure(error: Exception, path: Path, what: str = "") -> Exception:
    """Returns the error for a read that failed: ``UserError`` if it may be temporary, else ``ParquetError``."""
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, LASTING):
        return UserError(f"cannot read {path}: {error}; run the same command again to continue")
    return ParquetError(f"{what}{_said(error)}")


def _said(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:160])
