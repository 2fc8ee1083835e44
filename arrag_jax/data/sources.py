"""Folders of images and webdataset tars as a source: listed once, in one order, then read by number.

An image's id is its path below the source, with slashes; in a tar, the tar's path, "!" and the member's name:
"holiday/beach.jpg", "shards/00017.tar!000123.jpg". A source that is one tar has ids below its folder ("00017.tar!…").

What counts as an image is told by the ending of its name, among those of PIL's formats; names that begin with a dot
are left out. Links to files are followed, links to folders are not. The order is that of the ids by code point.
"""

import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from arrag_jax.data import pixels
from arrag_jax.errors import UserError
from arrag_jax.files import whole_file
from arrag_jax.retrieval.encoding import BadImage

# Reading fails for these reasons whenever it is tried; for others (a network's, too many open files) it may not.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Entry(NamedTuple):
    """One image of a source, good or bad.

    Attributes:
      id: one line; see above.
      path: of the file that holds it, below the source's root.
      offset, size: of its bytes in that file.
      fault: why it cannot be had, where that is known already.
    """

    id: str
    path: str
    offset: int = 0
    size: int = 0
    fault: str = ""


class FileImages:
    """Listed images as a random-access source of examples (``retrieval.encoding.Examples``).

    Args:
      root: folder that the paths are below.
      entries: in order.
      size: height and width of the images given out.
    """

    def __init__(self, root: Path, entries: list[Entry], size: tuple[int, int]):
        self.root, self.entries, self.size = root, entries, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [h, w, 3]}, or ``BadImage``."""
        return {"image": pixels.decode(read_entry(self.root, self.entries[index]), self.size)}

    def source_id(self, index: int) -> str:
        """The id of an image."""
        return self.entries[index].id


def root_of(source: str) -> Path:
    """The folder that a source's ids are below."""
    return Path(source) if Path(source).is_dir() else Path(source).parent


def list_images(source: str) -> list[Entry]:
    """Every image of a folder (with all folders and tars in it) or of one tar, in the order of their ids.

    Raises:
      UserError: no such folder or tar, or no image in it.
    """
    if not Path(source).exists():
        raise UserError(f"config.source={source} does not exist; give a folder of images, a .tar or a data set's name")
    root = root_of(source)
    found = _walk(root) if Path(source).is_dir() else _members(root, Path(source).name)
    entries = sorted(map(_with_clean_id, found))
    if not entries:
        raise UserError(f"config.source={source} holds no image (endings are {', '.join(pixels.SUFFIXES)}) and no .tar")
    return entries


def read_entry(root: Path, entry: Entry) -> bytes:
    """The bytes of an image file.

    Raises:
      BadImage: it is gone, unreadable, or not as long as when it was listed.
      UserError: reading failed, but may succeed another time.
    """
    if entry.fault:
        raise BadImage(entry.fault)
    try:
        with open(root / entry.path, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
            longer = not entry.offset and os.fstat(file.fileno()).st_size > entry.size
    except LASTING as error:
        raise BadImage(f"unreadable: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"cannot read {root / entry.path}: {error}; run the same command again to continue") from error
    if len(data) != entry.size or longer:
        raise BadImage("its size is not what it was when the build began")
    return data


def read_image(source: str, source_id: str) -> bytes:
    """The bytes of the image that has this id in a folder or tar.

    Raises:
      BadImage: it is not there any more, or unreadable.
    """
    root = root_of(source)
    path, bang, member = source_id.partition(".tar!")
    if bang and not (root / source_id).exists():
        wanted = (entry for entry in _members(root, f"{path}.tar") if entry.id in (source_id, f"{path}.tar"))
        return read_entry(root, next(wanted, Entry(source_id, "", fault=f"no member {member} in {path}.tar")))
    return read_entry(root, _file_entry(root, source_id))


def save_listing(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a listing, one JSON array a line; whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.writelines(f"{json.dumps(entry)}\n" for entry in entries)


def load_listing(path: Path) -> list[Entry]:
    """Reads a listing.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        with open(path, encoding="ascii") as file:
            return [Entry(*json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: it lists an unfinished build's images; choose another --workdir"
        ) from error


def _walk(root: Path) -> Iterator[Entry]:
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            path = PurePosixPath(os.path.relpath(os.path.join(folder, name), root)).as_posix()
            if name.startswith("."):
                continue
            if name.endswith(".tar") and name in files:
                yield from _members(root, path)
            elif name.lower().endswith(pixels.SUFFIXES):
                yield _file_entry(root, path)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; mend it, or move it out of config.source")


def _file_entry(root: Path, path: str) -> Entry:
    try:
        facts = os.stat(root / path)
    except OSError as error:
        return Entry(path, path, fault=f"unreadable: {error.strerror}")
    fault = "" if stat.S_ISREG(facts.st_mode) else "not a file but a folder or a device"
    return Entry(path, path, 0, facts.st_size, fault)


def _members(root: Path, path: str) -> Iterator[Entry]:
    """The images of a tar; what is wrong with the tar itself is one more entry, by the tar's name."""
    names: set[str] = set()
    try:
        with tarfile.open(root / path, "r:") as tar:  # "r:": compressed ones have no random access
            end = os.path.getsize(root / path)
            for member in tar:
                name = PurePosixPath(member.name).as_posix()
                hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
                if member.isreg() and not hidden and name.lower().endswith(pixels.SUFFIXES):
                    fault = "the tar holds an earlier member of this name" if name in names else ""
                    fault = "cut off: the tar ends before it" if member.offset_data + member.size > end else fault
                    names.add(name)
                    yield Entry(f"{path}!{name}", path, member.offset_data, member.size, fault)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        yield Entry(path, path, fault=f"not a whole tar file ({len(names)} images found in it): {reason}")


def _with_clean_id(entry: Entry) -> Entry:
    """The entry as it can stand in a line of text; a name that cannot is a fault."""
    clean = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), entry.id)
    if clean == entry.id:
        return entry
    return entry._replace(id=clean, fault=entry.fault or "its name holds control characters or is not UTF-8; rename it")
