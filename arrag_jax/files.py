"""Writing files so that a half-written one is never taken for whole, and telling files apart."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.failures import code_of, tells_of_a_full_disk, tells_of_memory, unwritable

# What a file system without locks answers; NFS takes no lock of a folder that is opened for reading.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
GLANCE = 0.3  # seconds for which a lock may be another process's look at it (``is_held``)
_told: set[str] = set()  # folders of which it is said that they cannot be locked


def sample_hash(path: Path) -> str:
    """SHA-256 of a file's size and of blocks spread over it: tells two checkpoints apart without reading them whole.

    A file of up to 4 MiB is read whole.
    """
    block, blocks, size = 2**16, 64, path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(blocks):
            file.seek(number * block if size <= block * blocks else number * (size - block) // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; on leaving it is synced and renamed to ``path``.

    The temporary name is fixed, so that a killed run's remains are overwritten by the next one.

    Raises:
      UserError: the disk is full or refuses the write; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with write_errors(path):
            temporary.unlink(missing_ok=True)  # it may be a link, which would be written through
            yield temporary
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def folder_in(root: Path, *names: str) -> Path:
    """Returns the folder of this name in ``root``, made where it is absent with all above it.

    Raises:
      UserError: as ``require_within``, or it cannot be made.
    """
    folder = require_within(root, root.joinpath(*names))
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_within(root: Path, folder: Path) -> Path:
    """Returns the folder of ``root``; a UserError if a link leads out of ``root``, where nothing is to be written."""
    with write_errors(folder):
        real, top = os.path.realpath(folder), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise UserError(f"{folder} is a link that leads out of {root}, to {real}; nothing is written there: remove it")
    return folder


def require_writable(folder: Path) -> None:
    """Makes a folder where it is absent; a UserError if it cannot be written, said before any long work."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def removed(path: Path) -> None:
    """Removes whatever stands at ``path``: a file, a folder with all in it, or a link (not what it leads to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, what: str, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside ``target``; on leaving it becomes ``target``, and vanishes if anything fails.

    Its name is fixed, so that the next run clears away what a killed one left; it is locked, so that of two runs at
    once the second is refused.

    Args:
      what: what is written, for messages ("an index").
      replace: take the place of what stands at ``target``, even of a link; else there must be nothing or an empty
        folder, perhaps by a link.

    Raises:
      UserError: another process writes there, there is something already, or the disk is full.
    """
    target = target.parent.absolute() / target.name if replace else Path(os.path.realpath(target))
    temporary, old = (target.with_name(f".{target.name}.{state}") for state in ("tmp", "old"))
    with write_errors(target):
        if temporary.is_symlink() or temporary.is_file():
            temporary.unlink()
        temporary.mkdir(parents=True, exist_ok=True)  # perhaps that of another process, see below
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


def clear_leftovers(target: Path) -> None:
    """Removes what a killed ``atomic_folder`` left beside ``target``, unless another process is at work on it."""
    temporary, old = (target.with_name(f".{target.name}.{state}") for state in ("tmp", "old"))
    if temporary.is_dir() and not temporary.is_symlink():
        with contextlib.suppress(UserError, OSError), exclusive_lock(temporary):
            removed(old)
            removed(temporary)
    else:
        removed(temporary)
        removed(old)


def require_new(target: Path, flag: str = "") -> None:
    """Raises UserError where there is something at ``target`` already; ``flag``: what gave it, for the message."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag}{target} is in use; choose a new folder")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all; keys in the order given."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        # A file's name that is not UTF-8 has half characters, which JSON knows as escapes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def exclusive_lock(directory: Path, wait: bool = False, alone: bool = True, refusal: str = "") -> Iterator[None]:
    """Holds the directory for this process; the lock ends with the process, however it ends.

    Where the file system has no locks, this is said once, and nothing is held.

    Args:
      wait: while another process holds it, instead of raising.
      alone: one process is meant to write; else a file system without locks will not do.
      refusal: what to say where another process holds it.

    Raises:
      UserError: another process holds it.
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
    if there is None or not os.path.samestat(there, os.fstat(handle)):  # another process moved it meanwhile
        raise UserError(refusal)


def is_held(directory: Path) -> bool:
    """Tells whether a process holds the directory by ``exclusive_lock``."""
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
    """Tells whether a process is at work on ``atomic_folder`` of this target."""
    return is_held(target.with_name(f".{target.name}.tmp"))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write ``path`` into one line."""
    try:
        yield
    except BrokenPipeError:  # of the console
        raise
    except (OSError, RuntimeError) as error:  # ArrayRecord and ScaNN raise RuntimeError
        if tells_of_memory(error):
            raise
        # ScaNN says "I/O error" of everything.
        full = tells_of_a_full_disk(error) or (code_of(error) in (None, errno.EIO) and free_bytes(path) < 2**20)
        raise UserError(unwritable(path, error, full)) from error


def free_bytes(path: Path) -> int | float:
    """Returns how much more the file system of ``path`` takes; infinity where it does not tell (/proc)."""
    for parent in path.absolute().parents:
        with contextlib.suppress(OSError):  # it is not there, or its name is too long, …
            usage = shutil.disk_usage(parent)
            return usage.free if usage.total else float("inf")
    return float("inf")


def sync(path: Path) -> None:
    """Makes a file's or directory's content safe from a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
