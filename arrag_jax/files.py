"""Writes files and folders atomically, locks folders, and computes checksums of files."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.failures import code_of, tells_of_a_full_disk, tells_of_memory, unwritable

# Errors that a file system without locks returns; NFS returns EBADF for a folder that is opened for reading.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
GLANCE = 0.3  # seconds to retry, because ``is_held`` in another process takes the lock for a moment
_writer = ""  # set by ``name_writer``
_follower: Callable[[Path], None] | None = None  # set by ``followed``
_told: set[str] = set()  # folders for which the warning about missing locks was printed


def sample_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's size and of sample blocks spread over the file, in hex.

    It distinguishes two checkpoints without reading all their bytes. A file of up to 4 MiB is read completely.
    """
    block, blocks, size = 2**16, 64, path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(blocks):
            file.seek(number * block if size <= block * blocks else number * (size - block) // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on exit the file there is synced and renamed to ``path``.

    The temporary name is fixed, so the next run overwrites what a killed run left; ``name_writer`` changes that. If
    anything fails, the temporary file is removed.

    Raises:
      UserError: if the file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}{_writer}.tmp")
    try:
        with write_errors(path):
            temporary.unlink(missing_ok=True)  # a link would redirect the write to its target
            yield temporary
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finished(path)


@contextlib.contextmanager
def followed(follower: Callable[[Path], None]) -> Iterator[None]:
    """Has a function called with the path of each file and folder that is finished while this is open."""
    global _follower
    before, _follower = _follower, follower
    try:
        yield
    finally:
        _follower = before


def is_followed() -> bool:
    """Returns whether a function follows what is finished; see ``followed``."""
    return _follower is not None


def finished(path: Path) -> None:
    """Tells whoever follows that a file or folder is finished, or removed as a whole; see ``followed``."""
    if _follower is not None:
        _follower(path)


def name_writer(name: str) -> None:
    """Sets a name that this process adds to its temporary files.

    A file that is given to a second process, because the first one seems dead, can thus be written by both at once.
    ``remove_temporary`` removes what is left.
    """
    global _writer
    _writer = f".{name}"


def remove_temporary(folder: Path) -> None:
    """Removes all temporary files of ``atomic_write`` in a folder; call it when no process writes there any more."""
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


def folder_in(root: Path, *names: str) -> Path:
    """Returns a folder in ``root``; creates it, and its parents, if it is absent.

    Raises:
      UserError: if a link leads out of ``root``, or the folder cannot be created.
    """
    folder = require_within(root, root.joinpath(*names))
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_within(root: Path, folder: Path) -> Path:
    """Returns ``folder``, if it lies in ``root``.

    Raises:
      UserError: if a link leads out of ``root``, where nothing must be written.
    """
    with write_errors(folder):
        real, top = os.path.realpath(folder), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise UserError(f"{folder} is a link that leads out of {root}, to {real}; nothing is written there: remove it")
    return folder


def require_writable(folder: Path) -> None:
    """Creates a folder if it is absent; raises UserError if it cannot be written. Call it before long work."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def removed(path: Path) -> None:
    """Removes what is at ``path``: a file, a folder with its content, or a link (but not the link's target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, what: str, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary empty folder beside ``target``; on exit it is synced and renamed to ``target``.

    If anything fails, the temporary folder is removed and ``target`` stays as it was. The temporary name is fixed, so
    the next run removes what a killed run left. The temporary folder is locked, so a second run at the same time is
    refused.

    Args:
      target: the folder to create.
      what: name of the content, for messages ("an index").
      replace: replace what is at ``target``, even a link. Otherwise ``target`` must be absent, or an empty folder, or
        a link to an empty folder.

    Raises:
      UserError: if another process writes there, something is there already, or the disk is full.
    """
    target = target.parent.absolute() / target.name if replace else Path(os.path.realpath(target))
    temporary, old = (target.with_name(f".{target.name}.{state}") for state in ("tmp", "old"))
    with write_errors(target):
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()
        temporary.mkdir(parents=True, exist_ok=True)  # it may belong to another process; the lock decides
    with exclusive_lock(temporary, refusal=f"another process writes {what} to {target}; wait for it"):
        for left in (old, *temporary.iterdir()):
            removed(left)
        try:
            if not replace:
                require_new(target)
            with write_errors(target):
                yield temporary
                sync(temporary)
                if replace and os.path.lexists(target):
                    target.rename(old)
                temporary.rename(target)
                sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not os.path.lexists(target):
                old.rename(target)
            raise
        finally:
            removed(old)
        finished(target)


def clear_leftovers(target: Path) -> None:
    """Removes what a killed ``atomic_folder`` left beside ``target``, unless another process is writing there."""
    temporary, old = (target.with_name(f".{target.name}.{state}") for state in ("tmp", "old"))
    if temporary.is_dir() and not temporary.is_symlink():
        with contextlib.suppress(UserError, OSError), exclusive_lock(temporary):
            removed(old)
            removed(temporary)
    else:
        removed(temporary)
        removed(old)


def require_new(target: Path, flag: str = "") -> None:
    """Raises UserError if ``target`` exists, unless it is an empty folder.

    Args:
      flag: text before the path in the message, such as the flag that gave the path.
    """
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag}{target} is in use; choose a new folder")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically; keys keep their order."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # A file name that is not UTF-8 contains lone surrogates, which JSON can only hold as escapes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def exclusive_lock(directory: Path, wait: bool = False, alone: bool = True, refusal: str = "") -> Iterator[None]:
    """Holds an exclusive lock on a directory while open; the lock also ends when the process ends in any way.

    If the file system has no locks, a warning is printed once and nothing is locked.

    Args:
      wait: wait while another process holds the lock, instead of raising.
      alone: only one process is expected to write. If False, a file system without locks is an error.
      refusal: the message if another process holds the lock.

    Raises:
      UserError: if another process holds the lock, or locks are needed and the file system has none.
    """
    refusal = refusal or f"another process is writing to {directory}; wait for it or choose another --workdir"
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, directory, wait, alone, refusal)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path, wait: bool, alone: bool, refusal: str) -> None:
    try:
        give_up = time.monotonic() + GLANCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise UserError(refusal) from None
                time.sleep(GLANCE / 10)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lacking = f"the file system of {directory} has no locks ({error.strerror})"
        if not alone:
            raise UserError(f"{lacking}, which several processes need; choose a folder on another one") from error
        if str(directory) not in _told:
            _told.add(str(directory))
            print(f"{lacking}; take care that one process alone writes there", file=sys.stderr)
        return
    there = os.stat(directory) if os.path.exists(directory) else None
    if there is None or not os.path.samestat(there, os.fstat(handle)):  # another process has replaced the directory
        raise UserError(refusal)


def is_held(directory: Path) -> bool:
    """Returns whether a process holds an ``exclusive_lock`` on the directory."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def is_being_written(target: Path) -> bool:
    """Returns whether a process is inside ``atomic_folder`` for this target."""
    return is_held(target.with_name(f".{target.name}.tmp"))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns errors about writing ``path`` into a ``UserError`` of one line."""
    try:
        yield
    except BrokenPipeError:  # it concerns the console, not ``path``
        raise
    except (OSError, RuntimeError) as error:  # ArrayRecord and ScaNN raise RuntimeError
        if tells_of_memory(error):
            raise
        # ScaNN reports "I/O error" for every failure, so the free space is checked.
        full = tells_of_a_full_disk(error) or (code_of(error) in (None, errno.EIO) and free_bytes(path) < 2**20)
        raise UserError(unwritable(path, error, full)) from error


def free_bytes(path: Path) -> int | float:
    """Returns the free bytes of the file system of ``path``; infinity if it does not report them (/proc)."""
    for parent in path.absolute().parents:
        with contextlib.suppress(OSError):  # the parent does not exist, or its name is too long
            usage = shutil.disk_usage(parent)
            return usage.free if usage.total else float("inf")
    return float("inf")


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk, so that its content survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
