"""Lists the files of a folder, the members of tars and the rows of Parquet files that are or may be images."""

import collections
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from arrag_jax.config import ColumnsConfig
from arrag_jax.data import endings, parquet, tars
from arrag_jax.data.endings import COMPRESSED, HIDDEN, TAR
from arrag_jax.data.entries import Entry
from arrag_jax.data.examples import PASSED_OVER
from arrag_jax.data.sidecars import Sidecars
from arrag_jax.errors import UserError

NO_FILE = "not a file but a folder or a device"


class Lister:
    """Lists the images of a folder, a tar or a Parquet file.

    Args:
      root: the folder that paths are relative to.
      captions, rights: whether to read captions, and licences and sources.
      columns: the columns of Parquet files.

    Attributes:
      beside: ending → number of files that hold no image, and reason → number of rows without one.
      refused: id of each whole file that cannot be read → the reason.
      unused: says of the first Parquet file without a column of images which columns it has; "" if there is none.
    """

    def __init__(self, root: Path, captions: bool, columns: ColumnsConfig, rights: bool = False):
        self.root, self.captions, self.columns, self.rights = root, captions, columns, rights
        self.beside: collections.Counter[str] = collections.Counter()
        self.refused: dict[str, str] = {}
        self.unused = ""
        self._side: tuple[str, dict[str, str]] = ("", {})  # the side file that was read last, with its captions

    def walk(self) -> Iterator[Entry]:
        """Yields the images of a folder, with all folders and tars in it."""
        for folder, folders, files in os.walk(self.root, onerror=_refuse):
            below = PurePosixPath(os.path.relpath(folder, self.root)).as_posix()
            prefix = "" if below == "." else f"{below}/"
            linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            sidecars = Sidecars()
            for name in files:
                sidecars.add(prefix + name)
            for name in sorted([*folders, *files]):
                path = prefix + name
                if name.startswith("."):
                    self.beside[HIDDEN] += 1
                elif name in linked:
                    yield Entry(path, path, fault="a link to a folder, which is not followed")
                elif name in folders:
                    if endings.is_image(name):
                        yield Entry(path, path, fault=NO_FILE)
                else:
                    yield from self._path(path, sidecars)
            folders[:] = [name for name in folders if not name.startswith(".")]

    def named(self, paths: list[str]) -> Iterator[Entry]:
        """Yields the images of these files alone."""
        sidecars = Sidecars()
        for path in paths:
            sidecars.add(path)
        for path in paths:
            yield from self._path(path, sidecars)

    def _path(self, path: str, sidecars: Sidecars) -> Iterator[Entry]:
        if path.lower().endswith(TAR):
            yield from self.members(path)
        elif path.lower().endswith(parquet.SUFFIX):
            yield from self.rows(path)
        else:
            yield from self._file(_file_entry(self.root, path), sidecars, self._start_of_file)

    def rows(self, path: str) -> Iterator[Entry]:
        """Yields the images of a Parquet file; if the file itself cannot be read, one entry with its name says so."""
        whole = _file_entry(self.root, path)
        try:
            if whole.fault:
                raise parquet.ParquetError(whole.fault)
            table = parquet.Table(self.root / path, self.columns)
        except parquet.ParquetError as error:
            self.refused[path] = str(error)
            yield whole._replace(fault=str(error))
            return
        column, names = table.columns.image, set()
        if not column:
            self.beside[parquet.SUFFIX] += 1
            self.unused = self.unused or f"{path} has no column of images; its columns are {table.names}"
            return
        for row in table.rows(self.captions, self.rights):
            if row.size is None:
                self.beside[f"rows without an image ({row.fault})" if row.fault else "rows without an image"] += 1
                continue
            name = row.key or f"{row.number:09d}"
            name = f"{name}#{row.number}" if name in names else name
            names.add(name)
            yield Entry(f"{path}!{name}", path, row.number, row.size, row.fault, row.caption, column, *row.rights)

    def members(self, path: str) -> Iterator[Entry]:
        """Yields the images of a tar; if the tar itself is damaged, one more entry with the tar's name says so."""
        whole = _file_entry(self.root, path)
        if whole.fault:
            yield whole
            return
        try:
            with open(self.root / path, "rb") as file:
                yield from self._members_of(file, whole)
        except OSError as error:
            yield Entry(path, path, fault=f"unreadable: {error.strerror}")

    def _members_of(self, file: Any, whole: Entry) -> Iterator[Entry]:
        files: dict[str, Entry] = {}
        names: dict[str, str] = {}
        again, sidecars, trouble = [], Sidecars(), ""
        try:
            for member in tars.members(file, whole.size):
                entry, kind = _member_entry(whole, member)
                if kind == "folder":
                    continue
                if entry.id in files:
                    again.append(entry._replace(fault="the tar holds an earlier member of this name"))
                else:
                    files[entry.id], names[entry.id] = entry, member.name
                    sidecars.add(entry.id)
        except (tars.TarError, OSError) as error:
            trouble = str(getattr(error, "strerror", None) or error)

        def start_of(name: str, length: int) -> bytes:
            entry = files[name]
            if entry.fault:
                raise ValueError(entry.fault)
            file.seek(entry.offset)
            return file.read(min(entry.size, length))

        found = [x for entry in files.values() for x in self._file(entry, sidecars, start_of, names[entry.id])]
        yield from found
        yield from (entry for entry in again if endings.is_image(entry.id))
        if trouble:
            images = sum(endings.is_image(entry.id) and not entry.fault for entry in files.values())
            yield Entry(whole.id, whole.path, fault=f"not a whole tar file ({images} images found in it): {trouble}")

    def _file(self, entry: Entry, sidecars: Sidecars, read: Any, member: str = "") -> Iterator[Entry]:
        """Yields the entry of a file, or of a member of a tar, if it is or may be an image; else counts the file."""
        name = member or entry.id
        hidden = any(part.startswith(".") and part != ".." for part in PurePosixPath(member).parts)
        if hidden or endings.is_beside(name):
            self.beside[HIDDEN if hidden else endings.ending(name)] += 1
        elif endings.is_image(name):
            if self.captions and not entry.fault:
                caption, fault = sidecars.caption(entry.id, read)
                if not caption and not fault:
                    caption = self._beside_shard(entry, name)
                entry = entry._replace(caption=caption, fault=fault)
            if self.rights and not entry.fault:
                rights, fault = sidecars.rights(entry.id, read)
                entry = entry._replace(**rights._asdict(), fault=fault)
            yield entry
        elif name.lower().endswith((TAR, *COMPRESSED)):
            yield entry._replace(fault="a tar inside a tar; unpack it" if member else _PACKED)
        else:
            yield entry._replace(fault=f"{PASSED_OVER}{endings.why_passed_over(name)}")

    def _beside_shard(self, entry: Entry, name: str) -> str:
        """Returns the caption in the Parquet file that img2dataset writes beside a shard; "" if there is none.

        Args:
          name: of the image's file, whose base name up to the first dot is its key.
        """
        shard = entry.path.removesuffix(TAR) if entry.id != entry.path else entry.path.rpartition("/")[0]
        side = f"{shard}{parquet.SUFFIX}"
        if not shard or not (self.root / side).is_file():
            return ""
        if self._side[0] != side:
            try:
                self._side = side, parquet.Table(self.root / side, self.columns).captions_by_key()
            except parquet.ParquetError:  # it is listed itself, with the reason
                self._side = side, {}
        return self._side[1].get(PurePosixPath(name).name.partition(".")[0], "")

    def _start_of_file(self, path: str, length: int) -> bytes:
        if not (self.root / path).is_file():
            raise ValueError("it is not a file")
        with open(self.root / path, "rb") as file:
            return file.read(length)


_PACKED = "a compressed tar, in which nothing can be looked up; unpack it"
_KINDS = {
    "link": "a link inside a tar",
    "sparse": "stored with holes (a sparse member); pack the tar again without them",
    "other": NO_FILE,
}


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; mend it, or move it out of config.source")


def _file_entry(root: Path, path: str) -> Entry:
    try:
        facts = os.stat(root / path)
    except OSError as error:
        return Entry(path, path, fault=f"unreadable: {error.strerror}")
    fault = "" if stat.S_ISREG(facts.st_mode) else NO_FILE
    return Entry(path, path, 0, facts.st_size, fault)


def _member_entry(whole: Entry, member: tars.Member) -> tuple[Entry, str]:
    """Returns a member of a tar as an entry, and its kind; the fault says why its bytes cannot be read from the tar."""
    id_ = f"{whole.path}!{PurePosixPath(member.name).as_posix()}"
    fault = _KINDS.get(member.kind, "")
    if not fault and member.offset + member.size > whole.size:
        fault = "cut off: the tar ends before it"
    return Entry(id_, whole.path, member.offset, member.size, fault), member.kind
