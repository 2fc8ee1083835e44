"""Lists the images of a folder (with webdataset tars in it) or of one tar in a fixed order, and reads them by number.

The id of an image is its path relative to the source, with slashes. In a tar it is the path of the tar, "!" and the
name of the member: "holiday/beach.jpg", "shards/00017.tar!000123.jpg". If the source is one tar, ids are relative to
its folder ("00017.tar!…"). Images are sorted by id, by code point.

A file is an image if its ending belongs to one of PIL's formats. Links to files are followed. Things that may hold
images but are not opened (a link to a folder, a compressed tar, a tar or a link inside a tar) are listed as bad images.
Files that may be images but are not read (HEIC without its package, raw data of cameras, names without an ending) are
listed as passed over. Files that certainly hold no image, and names that begin with a dot, are only counted by ending.

If captions are requested, the caption of an image is in a file next to it (``sidecars``).
"""

import collections
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from arrag_jax.data import endings, pixels, tars
from arrag_jax.data.endings import COMPRESSED, HIDDEN, TAR
from arrag_jax.data.examples import PASSED_OVER, BadImage, caption_of
from arrag_jax.data.sidecars import Sidecars
from arrag_jax.errors import UserError, printable
from arrag_jax.files import atomic_write

LARGEST = 2**30  # bytes of an image file; PIL's limit of pixels needs no more
NO_FILE = "not a file but a folder or a device"
# Errors that occur again on every attempt; others (network errors, too many open files) may be temporary.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Entry(NamedTuple):
    """One image of a source, readable or not.

    Attributes:
      id: one line of text, see the module's docstring.
      path: path of the file that holds it, relative to the source's root.
      offset, size: where its bytes are in that file.
      fault: the reason why it cannot be read, if that is already known.
      caption: its caption, if captions were requested.
    """

    id: str
    path: str
    offset: int = 0
    size: int = 0
    fault: str = ""
    caption: str = ""

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


class FileImages:
    """Listed images as a random-access source of examples (``data.examples.Images``).

    Args:
      root: the folder that paths are relative to.
      entries: the images, in order.
      size: height and width of the images that are returned.
    """

    def __init__(self, root: Path, entries: list[Entry], size: tuple[int, int]):
        self.root, self.entries, self.size = root, entries, size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"image": uint8 [h, w, 3], "caption": str}.

        Raises:
          BadImage: if the image cannot be read.
        """
        entry = self.entries[index]
        return {"image": pixels.decode(read_entry(self.root, entry), self.size), "caption": entry.caption}

    def source_id(self, index: int) -> str:
        """Returns the id of an image."""
        return self.entries[index].id

    def caption(self, index: int) -> str:
        """Returns an image's caption in one line; raises ``BadImage`` if the listing has a fault for the image."""
        if self.entries[index].fault:
            raise BadImage(self.entries[index].fault)
        return caption_of({"caption": self.entries[index].caption})

    @property
    def num_passed_over(self) -> int:
        """Number of entries that are passed over."""
        return sum(entry.is_passed_over for entry in self.entries)


def root_of(source: str) -> Path:
    """Returns the folder that a source's ids are relative to; the ending decides if the source no longer exists."""
    path = Path(source)
    is_folder = path.is_dir() or not (path.exists() or source.lower().endswith(TAR))
    return path if is_folder else path.parent


def spelt_alike(source: str, known: Iterable[str]) -> str:
    """Returns the spelling of the first known source that is the same file or folder, else ``source`` itself."""
    return next((x for x in known if x == source or Path(x).resolve() == Path(source).resolve()), source)


def list_images(source: str, captions: bool = False) -> list[Entry]:
    """Returns the entries of ``list_source``."""
    return list_source(source, captions).entries


def list_source(source: str, captions: bool = False, key: str = "config.source") -> Listing:
    """Returns every image of a folder (with all folders and tars in it) or of one tar, sorted by id.

    Args:
      source: path of the folder or tar.
      captions: whether to read captions.
      key: name of the setting, for error messages.

    Raises:
      UserError: if there is no such folder or tar, it holds no image, or captions are requested and there is none.
    """
    path, root = Path(source), root_of(source)
    if not path.exists():
        raise UserError(f"{key}={source} does not exist; give a folder of images, a .tar or a data set's name")
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(TAR)):
        raise UserError(f"{key}={source} is neither a folder nor a plain .tar; give one, or the folder it is in")
    lister = _Lister(root, captions)
    found = lister.walk() if path.is_dir() else lister.members(path.name)
    entries = sorted(map(_with_clean_id, found))
    if all(entry.is_passed_over for entry in entries):
        others = "".join(f"; {entry.id}: {entry.fault}" for entry in entries[:3])
        raise UserError(f"{key}={source} holds no image (endings are {', '.join(pixels.SUFFIXES)}) and no .tar{others}")
    if captions and not any(entry.caption for entry in entries):
        raise UserError(
            f"{key}={source} has no captions (a .txt or .json beside an image); add them. A datastore "
            "can do without: config.captions=False"
        )
    return Listing(entries, dict(sorted(lister.beside.items())))


def read_entry(root: Path, entry: Entry) -> bytes:
    """Returns the bytes of an image file.

    Raises:
      BadImage: if the file is missing, unreadable or too large, or its size has changed since it was listed.
      UserError: if reading failed for a reason that may be temporary.
    """
    if entry.fault:
        raise BadImage(entry.fault)
    if entry.size > LARGEST:
        raise BadImage(f"too large: {entry.size:,} bytes, more than {LARGEST:,}")
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


class _Lister:
    """Lists the images of a folder or a tar.

    Attributes:
      beside: ending → number of files that hold no image.
    """

    def __init__(self, root: Path, captions: bool):
        self.root, self.captions = root, captions
        self.beside: collections.Counter[str] = collections.Counter()

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
                elif name.lower().endswith(TAR):
                    yield from self.members(path)
                else:
                    yield from self._file(_file_entry(self.root, path), sidecars, self._start_of_file)
            folders[:] = [name for name in folders if not name.startswith(".")]

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
                entry = entry._replace(caption=caption, fault=fault)
            yield entry
        elif name.lower().endswith((TAR, *COMPRESSED)):
            yield entry._replace(fault="a tar inside a tar; unpack it" if member else _PACKED)
        else:
            yield entry._replace(fault=f"{PASSED_OVER}{endings.why_passed_over(name)}")

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


def _with_clean_id(entry: Entry) -> Entry:
    """Returns the entry with an id and a fault that are one line of text; an id that had to be changed is a fault."""
    clean, fault = printable(entry.id), printable(entry.fault)
    if clean == entry.id:
        return entry._replace(fault=fault)
    return entry._replace(id=clean, fault=fault or "its name holds control characters or is not UTF-8; rename it")
