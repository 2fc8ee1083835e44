"""Lists the members of an uncompressed tar file from an untrusted source: every read is bounded, every step advances.

Python's ``tarfile`` ends silently at the first end-of-archive mark and at damage after the first header, loops if a
size is negative, and reads headers of any size. This module lists all archives that follow one another in one file, and
damage is an error that names the byte. It uses ``tarfile`` only to parse single headers.
"""

import errno
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
LARGEST_HEADER = 2**20  # bytes of a long name or of pax records; paths have at most a few thousand bytes
ZEROS = 2**20  # bytes read at once after the end of an archive
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
SPARSE_RECORDS = "GNU.sparse."


class TarError(ValueError):
    """A tar file cannot be read any further; the message is the reason."""


class Member(NamedTuple):
    """One member of a tar.

    Attributes:
      name: as in the header; bytes that are not UTF-8 become surrogates.
      offset, size: where its bytes are in the tar file; they may be beyond its end.
      kind: "file", "folder", "link", "sparse" (a file with holes, whose bytes are not stored contiguously) or "other".
    """

    name: str
    offset: int
    size: int
    kind: str


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """Yields the members of a tar file in order, including those of further archives in the file.

    Args:
      file: the tar file; every read seeks first, so the caller may also seek in it.
      end: size of the file in bytes.

    Raises:
      TarError: if the file is empty or truncated, or a header is invalid.
    """
    if end == 0:
        raise TarError("empty file")
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    offset, long_name = 0, None
    while (offset := _after_zeros(file, offset, end)) < end:
        info, extended = _header(file, offset)
        offset += BLOCK
        if info.type in (*LONG_NAMES, *PAX, tarfile.XGLTYPE):
            data = _header_data(file, offset, info.size)
            offset += _padded(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in PAX:
                own = _pax_records(data, offset)
            elif info.type == tarfile.XGLTYPE:
                shared |= _pax_records(data, offset)
            continue
        while extended:  # skips the rest of an old GNU sparse map
            block = _read(file, offset, BLOCK)
            extended, offset = block[504] != 0, offset + BLOCK
        records = shared | own
        size = _size(records.get("size", info.size), offset)
        name = records.get(f"{SPARSE_RECORDS}name") or records.get("path") or long_name or info.name
        yield Member(name, offset, size, _kind(info, name, records))
        if info.type in tarfile.REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES:
            if offset + size > end:
                raise TarError("unexpected end of data")
            offset += _padded(size)
        own, long_name = {}, None


def _kind(info: tarfile.TarInfo, name: str, records: dict[str, str]) -> str:
    if info.isdir() or (info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and name.endswith("/")):
        return "folder"
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(SPARSE_RECORDS) for key in records):
        return "sparse"
    if info.type in LINKS:
        return "link"
    return "file" if info.type in tarfile.REGULAR_TYPES else "other"


def _header(file: BinaryIO, offset: int) -> tuple[tarfile.TarInfo, bool]:
    """Returns the header at this byte, and whether an old GNU sparse map continues in the next block."""
    block = _read(file, offset, BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError(f"{error or 'invalid header'} at byte {offset:,}") from None
    _size(info.size, offset)
    return info, info.type == tarfile.GNUTYPE_SPARSE and block[482] != 0


def _header_data(file: BinaryIO, offset: int, size: int) -> bytes:
    if size > LARGEST_HEADER:
        raise TarError(f"a header of {size:,} bytes at byte {offset:,}, more than {LARGEST_HEADER:,}")
    return _read(file, offset, size)


def _pax_records(data: bytes, where: int) -> dict[str, str]:
    """Returns the records of a pax header, each of which is "length key=value\\n"."""
    records, start = {}, 0
    try:
        while start < len(data) and data[start]:
            blank = data.index(b" ", start, start + 20)
            stop = start + int(data[start:blank])
            key, equals, value = data[blank + 1 : stop - 1].partition(b"=")
            if not blank < stop <= len(data) or data[stop - 1] != ord("\n") or not equals:
                raise ValueError
            records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            start = stop
    except ValueError:
        raise TarError(f"invalid pax header before byte {where:,}") from None
    return records


def _size(size: int | str, offset: int) -> int:
    try:
        size = int(size)
    except ValueError:
        size = -1
    if size < 0:
        raise TarError(f"a member of no valid size at byte {offset:,}")
    return size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _after_zeros(file: BinaryIO, offset: int, end: int) -> int:
    """Returns the offset of the next block that is not all zeros; ``end`` or more if there is none."""
    chunk = BLOCK
    while offset < end:
        file.seek(offset)
        data = file.read(chunk)
        filled = len(data) - len(data.lstrip(b"\0"))
        if filled < len(data):
            return offset + filled // BLOCK * BLOCK
        offset += chunk
        if chunk == ZEROS and offset < end:
            offset = max(offset, _data_from(file, offset, end) // BLOCK * BLOCK)
        chunk = ZEROS
    return offset


def _data_from(file: BinaryIO, offset: int, end: int) -> int:
    """Returns the offset of the next data that the file system stores; a sparse file may hold terabytes of zeros."""
    handle = file.fileno()
    before = os.lseek(handle, 0, os.SEEK_CUR)  # restored below, because the file's buffer relies on it
    try:
        return os.lseek(handle, offset, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset  # ENXIO = no more data
    finally:
        os.lseek(handle, before, os.SEEK_SET)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise TarError("unexpected end of data")
    return data
