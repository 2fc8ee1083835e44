"""Folders of images and webdataset tars as a source: listed once, in one order, then read by number.

An image's id is its path below the source, with slashes; in a tar, the tar's path, "!" and the member's name:
"holiday/beach.jpg", "shards/00017.tar!000123.jpg". A source that is one tar has ids below its folder ("00017.tar!…").

What counts as an image is told by the ending of its name, among those of PIL's formats; names that begin with a dot
are left out. Links to files are followed. What may hold images and is not looked into (a link to a folder, a compressed
tar, a tar or a link inside a tar) is listed as a bad image. The order is that of the ids by code point.

An image's caption, where captions are asked for, is the first line of the ``.txt`` beside it (of the same name but for
the ending), else the "caption" of the ``.json`` beside it, else empty.
"""

import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from arrag_jax.data import pixels
from arrag_jax.errors import UserError
from arrag_jax.files import whole_file
from arrag_jax.retrieval.encoding import BadImage

TAR, COMPRESSED, SIDECARS = ".tar", (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"), (".txt", ".json")
# Reading fails for these reasons whenever it is tried; for others (a network's, too many open files) it may not.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Entry(NamedTuple):
    """One image of a source, good or bad.

    Attributes:
      id: one line; see above.
      path: of the file that holds it, below the source's root.
      offset, size: of its bytes in that file.
      fault: why it cannot be had, where that is known already.
      caption: what it shows, if that was asked for.
    """

    id: str
    path: str
    offset: int = 0
    size: int = 0
    fault: str = ""
    caption: str = ""


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
        """{"image": uint8 [h, w, 3], "caption": its words}, or ``BadImage``."""
        entry = self.entries[index]
        return {"image": pixels.decode(read_entry(self.root, entry), self.size), "caption": entry.caption}

    def source_id(self, index: int) -> str:
        """The id of an image."""
        return self.entries[index].id


def root_of(source: str) -> Path:
    """The folder that a source's ids are below."""
    return Path(source) if Path(source).is_dir() else Path(source).parent


def spelt_alike(source: str, known: Iterable[str]) -> str:
    """The source, spelled as the first of the known ones that means the same file or folder."""
    return next((x for x in known if x == source or Path(x).resolve() == Path(source).resolve()), source)


def list_images(source: str, captions: bool = False) -> list[Entry]:
    """Every image of a folder (with all folders and tars in it) or of one tar, in the order of their ids.

    Raises:
      UserError: no such folder or tar, no image in it, or not one caption where captions are asked for.
    """
    path, root = Path(source), root_of(source)
    if not path.exists():
        raise UserError(f"config.source={source} does not exist; give a folder of images, a .tar or a data set's name")
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(TAR)):
        raise UserError(
            f"config.source={source} is neither a folder nor a plain .tar; give one, or the folder it is in"
        )
    found = _walk(root, captions) if path.is_dir() else _members(root, path.name, captions)
    entries = sorted(map(_with_clean_id, found))
    if not entries:
        raise UserError(f"config.source={source} holds no image (endings are {', '.join(pixels.SUFFIXES)}) and no .tar")
    if captions and not any(entry.caption for entry in entries):
        raise UserError(
            f"config.source={source} has no captions (a .txt or .json beside an image); add them. A datastore "
            "can do without: config.captions=False"
        )
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


def _walk(root: Path, captions: bool) -> Iterator[Entry]:
    def sidecar(name: str) -> bytes | None:
        return (root / name).read_bytes() if (root / name).is_file() else None

    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            path = PurePosixPath(os.path.relpath(os.path.join(folder, name), root)).as_posix()
            lower = name.lower()
            if name.startswith("."):
                continue
            if name in folders and os.path.islink(root / path):
                yield Entry(path, path, fault="a link to a folder, which is not followed")
            elif name in files and lower.endswith(TAR):
                yield from _members(root, path, captions)
            elif name in files and lower.endswith(COMPRESSED):
                yield Entry(path, path, fault="a compressed tar, in which nothing can be looked up; unpack it")
            elif lower.endswith(pixels.SUFFIXES):
                entry = _file_entry(root, path)
                yield _captioned(entry, sidecar) if captions else entry


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; mend it, or move it out of config.source")


def _file_entry(root: Path, path: str) -> Entry:
    try:
        facts = os.stat(root / path)
    except OSError as error:
        return Entry(path, path, fault=f"unreadable: {error.strerror}")
    fault = "" if stat.S_ISREG(facts.st_mode) else "not a file but a folder or a device"
    return Entry(path, path, 0, facts.st_size, fault)


def _members(root: Path, path: str, captions: bool) -> Iterator[Entry]:
    """The images of a tar; what is wrong with the tar itself is one more entry, by the tar's name."""
    whole = _file_entry(root, path)
    if whole.fault:
        yield whole
        return
    images: dict[str, Entry] = {}
    notes: dict[str, bytes] = {}
    try:
        with tarfile.open(root / path, "r:") as tar:  # "r:": compressed ones have no random access
            for member in tar:
                name = PurePosixPath(member.name).as_posix()
                id_, lower = f"{path}!{name}", name.lower()
                if any(part.startswith(".") for part in PurePosixPath(name).parts):
                    continue
                if captions and member.isreg() and name.endswith(SIDECARS):
                    notes[id_] = tar.extractfile(member).read()
                elif fault := _member_fault(member, lower, whole.size, id_ in images):
                    yield Entry(id_, path, member.offset_data, member.size, fault)
                elif member.isreg() and lower.endswith(pixels.SUFFIXES):
                    images[id_] = Entry(id_, path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        yield Entry(path, path, fault=f"not a whole tar file ({len(images)} images found in it): {reason}")
    yield from (_captioned(entry, notes.get) for entry in images.values())


def _member_fault(member: tarfile.TarInfo, lower: str, end: int, known: bool) -> str:
    """Why a member of a tar that is or may hold an image cannot be had; empty if there is nothing to say."""
    if member.isreg() and lower.endswith((TAR, *COMPRESSED)):
        return "a tar inside a tar; unpack it"
    if not lower.endswith(pixels.SUFFIXES):
        return ""
    if member.issym() or member.islnk():
        return "a link inside a tar"
    if known:
        return "the tar holds an earlier member of this name"
    return "cut off: the tar ends before it" if member.offset_data + member.size > end else ""


def _captioned(entry: Entry, sidecar: Callable[[str], bytes | None]) -> Entry:
    """The entry with its caption; ``sidecar`` gives the bytes of the file that has this id, None if there is none."""
    stem = entry.id.rpartition(".")[0]
    for suffix in SIDECARS:
        try:
            data = sidecar(stem + suffix)
            if data is not None:
                return entry._replace(caption=_caption_in(suffix, data.decode()))
        except (OSError, ValueError) as error:
            return entry._replace(fault=entry.fault or f"its caption in {stem}{suffix} cannot be read: {error}")
    return entry


def _caption_in(suffix: str, text: str) -> str:
    """The caption that a sidecar of this kind holds; a ValueError if it is none."""
    if suffix == ".txt":
        return text.strip().partition("\n")[0].strip()
    record = json.loads(text)
    caption = record.get("caption", "") if isinstance(record, dict) else record
    if not isinstance(caption, str):
        raise ValueError('its "caption" is no text')
    caption.encode()  # half a surrogate pair cannot be written
    return caption


def _with_clean_id(entry: Entry) -> Entry:
    """The entry as it can stand in a line of text; a name that cannot is a fault."""
    clean = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), entry.id)
    if clean == entry.id:
        return entry
    return entry._replace(id=clean, fault=entry.fault or "its name holds control characters or is not UTF-8; rename it")
