"""Reads folders at addresses of object storage, ``gs://BUCKET/PATH`` and ``s3://BUCKET/PATH``, through local copies.

A copy lies in a cache: ``ARRAG_STORAGE_CACHE``, else ``~/.cache/arrag_jax/storage``. A journal beside it says of which
object, by size and ETag, each file is the copy, so that what has arrived is not copied again and what has changed is.
The packages of the extra ``storage`` are imported at the first address that is read, not before. Their variables apply:
``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS`` and so on.

A process lists an address once, so that all of its reads see the same objects.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from arrag_jax import progress
from arrag_jax.errors import UserError, printable
from arrag_jax.failures import tells_of_a_full_disk
from arrag_jax.files import exclusive_lock, write_errors

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme → package of fsspec's file system
FORMS = "gs://BUCKET/PATH or s3://BUCKET/PATH"
CACHE = "ARRAG_STORAGE_CACHE"
UNFINISHED = ".unfinished"  # an object in a folder that is only whole as a whole, while it is written or removed
LOCK = ".lock"  # an object in the folder that a command writes
TOGETHER = 8  # files that are copied at the same time
_ADDRESS = re.compile(r"(gs|s3):/{1,2}([^/]+)((?:/[^/]+)+)/*")  # ``Path`` makes one slash of two


_places: dict[str, str] = {}  # local copies that this process has used → addresses


def named(text: str) -> str:
    """Returns a text in which addresses stand for the paths of their local copies."""
    for folder, address in _places.items():
        text = text.replace(folder, address)
    return text


@dataclasses.dataclass(frozen=True)
class Object:
    """What the storage says about an object: its size in bytes, and its ETag, which changes with its content."""

    size: int
    etag: str


def is_address(path: str | os.PathLike) -> bool:
    """Returns whether a path is written as an address of object storage."""
    return re.match(r"(gs|s3):/", os.fspath(path)) is not None


def canonical(text: str | os.PathLike, name: str) -> str:
    """Returns an address without slashes too many.

    Args:
      name: name of the setting, for the message.

    Raises:
      UserError: if it does not name a bucket and a path in it.
    """
    text = os.fspath(text)
    match = _ADDRESS.fullmatch(text)
    if match is None or {".", ".."} & set(text.split("/")) or not text.isprintable():
        raise UserError(f"{name}={printable(text)} names no folder of object storage; write {FORMS}")
    return f"{match[1]}://{match[2]}{match[3]}"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The objects at an address when this process first listed them.

    Attributes:
      id: the address.
      files: name below the address → object; the name is "" where the address is that of an object.
      place: the path of the local copy, a folder or a file.
    """

    id: str
    files: dict[str, Object]
    place: Path

    def below(self) -> dict[str, str]:
        """Returns name → name for each file, because names are relative to the address already."""
        return {name: name for name in self.files}

    @property
    def folder(self) -> Path:
        """The folder of the local copy."""
        return self.place


def snapshot(text: str | os.PathLike, name: str) -> Snapshot:
    """Returns what is at an address; nothing is copied.

    Args:
      name: name of the setting, for the message.

    Raises:
      UserError: if there is nothing, it is not finished, access is refused, or the storage cannot be reached.
    """
    address = canonical(text, name)
    files = _listed_once(address, os.environ.get("AWS_ENDPOINT_URL", ""))
    if not files:
        raise UserError(f"{name}={address}: there is nothing; check the bucket and the path")
    found = without_unfinished(files)
    if not found:
        raise UserError(f"{name}={address} is not finished: a command writes it, or was killed; run that command again")
    return Snapshot(address, found, copy_of(address, "copies").folder)


def fetch(of: Snapshot, names: Collection[str]) -> None:
    """Copies those of the named files that the local copy lacks, or of which it has another version.

    Files that have arrived stay when a later one fails, so that the same call continues. Files that are not at the
    address any more go.

    Raises:
      UserError: if a file cannot be read or has changed meanwhile, or the disk is full.
    """
    copy = copy_of(of.id, "copies")
    if not copy.lacks({name: of.files[name] for name in names}) and copy.known.keys() <= of.files.keys():
        return
    with exclusive_lock(copy.home, wait=True):
        copy.read_journal()  # another process may have copied meanwhile
        copy.prune(of.files)
        copy.bring({name: of.files[name] for name in names})


def copied(text: str | os.PathLike, name: str) -> Path:
    """Returns the path of a local copy of everything at an address; errors as in ``snapshot`` and ``fetch``."""
    found = snapshot(text, name)
    fetch(found, found.files)
    return found.place


def without_unfinished(files: dict[str, Object]) -> dict[str, Object]:
    """Returns the objects without those of folders that are being written or removed, and without locks."""
    open_ = tuple(name.removesuffix(UNFINISHED) for name in files if f"/{name}".endswith(f"/{UNFINISHED}"))
    return {
        name: each
        for name, each in files.items()
        if not name.startswith(open_) and name.rpartition("/")[2] not in (LOCK, UNFINISHED)
    }


def listed(address: str) -> dict[str, Object]:
    """Returns name below the address → object, in order; errors as in ``snapshot``."""
    with explained(address, "listing it"):
        found = client(address).find(address, detail=True)
    below = {path.partition(address.partition("://")[2])[2]: each for path, each in sorted(found.items())}
    objects = {name: object_of(each) for name, each in below.items() if not name.endswith("/")}
    return {name.removeprefix("/"): each for name, each in objects.items()}


def object_of(info: dict[str, Any]) -> Object:
    """Returns an object from what a client of fsspec says about it."""
    return Object(int(info["size"]), str(info.get("ETag") or info.get("etag") or info.get("generation") or ""))


@functools.lru_cache(maxsize=64)
def _listed_once(address: str, endpoint: str) -> dict[str, Object]:
    return listed(address)


@dataclasses.dataclass
class Copy:
    """A local copy of what is at an address, and the journal of it.

    Attributes:
      address: the address.
      home: the folder of the cache that holds both.
      folder: the copy; the path of a file if the address is that of one object.
      known: name below the address → the object, and the size and the time in ns of the file that equals it.
    """

    address: str
    home: Path
    folder: Path
    known: dict[str, tuple[Object, int, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._noting = threading.Lock()

    def path(self, name: str) -> Path:
        """Returns the path of the copy of a file."""
        return self.folder / name  # "" names the folder itself, which then is a file

    def lacks(self, files: dict[str, Object]) -> list[str]:
        """Returns the names of files whose copy is absent, or not of that object."""
        return [name for name, each in files.items() if self.known.get(name) != (each, *_facts(self.path(name)))]

    def read_journal(self) -> None:
        """Reads the journal; lines that a kill has cut off count for nothing."""
        self.known = {}
        journal = self.home / "journal.jsonl"
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines() if journal.is_file() else ():
            with contextlib.suppress(ValueError, TypeError):
                name, each, size, time = json.loads(line)
                self.known[name] = (Object(*each), size, time)

    def note(self, name: str, each: Object | None) -> None:
        """Notes that a file equals an object; None = there is no such object any more."""
        with self._noting, open(self.home / "journal.jsonl", "a", encoding="utf-8") as file:
            if each is None:
                self.known.pop(name, None)
                facts = (0, 0)
            else:
                facts = _facts(self.path(name))
                self.known[name] = (each, *facts)
            file.write(json.dumps([name, each and [each.size, each.etag], *facts]) + "\n")

    def prune(self, files: Collection[str]) -> None:
        """Removes all but these files, also what a kill has left."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_symlink() or not path.is_dir():
                if path.relative_to(self.folder).as_posix() not in files:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        for name in set(self.known) - set(files):
            self.note(name, None)

    def bring(self, files: dict[str, Object]) -> None:
        """Copies those of the files that are absent; errors as in ``fetch``."""
        lacking = self.lacks(files)
        with (
            progress.bar(total=sum(files[x].size for x in lacking), unit="B", unit_scale=True, desc="copying") as bar,
            concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool,
        ):
            jobs = {pool.submit(self._bring, name, files[name]): files[name].size for name in lacking}
            try:
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
                    bar.update(jobs[job])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _bring(self, name: str, expected: Object) -> None:
        path = self.path(name)
        temporary, source = path.with_name(f".{path.name}.tmp"), f"{self.address}/{name}".removesuffix("/")
        with explained(source, "copying it"), write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            client(source).get_file(source, str(temporary))
            if temporary.stat().st_size != expected.size:
                raise UserError(f"{source} has changed while it was copied; run the same command again")
            temporary.rename(path)
        self.note(name, expected)


def copy_of(address: str, purpose: str) -> Copy:
    """Returns the local copy of an address in the cache, as far as it is there.

    Args:
      purpose: the part of the cache: "copies", or "workdirs" for those that a command writes.

    Raises:
      UserError: if the cache cannot be written.
    """
    root = os.environ.get(CACHE) or Path.home() / ".cache" / "arrag_jax" / "storage"
    home = Path(root).resolve() / purpose / hashlib.sha256(address.encode()).hexdigest()[:16]
    with write_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    copy = Copy(address, home, home / address.rpartition("/")[2])
    _places[str(copy.folder)] = address
    copy.read_journal()
    return copy


def client(address: str) -> Any:
    """Returns fsspec's file system for an address.

    Raises:
      UserError: if its package is not installed.
    """
    scheme = address.partition(":")[0]
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(
            f"{address}: {scheme}:// needs the package {PACKAGES[scheme]}; pip install 'arrag_jax[storage]'"
        )
    return importlib.import_module("fsspec").filesystem(scheme, use_listings_cache=False)


@contextlib.contextmanager
def explained(address: str, doing: str) -> Iterator[None]:
    """Turns the errors of the storage's client into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FileExistsError:  # an answer, not a failure: see ``object_workdir``
        raise
    except Exception as error:  # each client has types of its own
        if tells_of_a_full_disk(error):
            raise
        said = printable(" ".join(str(error).split())[:160])
        if isinstance(error, FileNotFoundError):
            mend = "check the bucket and the path"
        elif isinstance(error, PermissionError) or "redential" in said or "redential" in type(error).__name__:
            mend = "access is refused; give credentials that may do that"
        else:
            mend = "check the network and the endpoint, and run the same command again, which continues"
        raise UserError(f"{address}: {doing} failed ({said}); {mend}") from error


def _facts(path: Path) -> tuple[int, int]:
    """Returns size and time of a file; (-1, 0) if there is none."""
    try:
        found = path.stat()
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns
