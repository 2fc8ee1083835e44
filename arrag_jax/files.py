"""Writing files so that a half-written one is never taken for whole, and telling files apart."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError

FULL_DISK = "the disk is full: free some space and run the same command again to continue"


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
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; on leaving it is synced and renamed to ``path``.

    The temporary name is fixed, so that a killed run's remains are overwritten by the next one.

    Raises:
      UserError: the disk is full or refuses the write; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explained(path):
            yield temporary
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all; keys in the order given."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def only_writer(directory: Path, wait: bool = False) -> Iterator[None]:
    """Holds the directory for this process; the lock ends with the process, however it ends.

    Args:
      wait: while another process holds it, instead of raising.

    Raises:
      UserError: another process holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise UserError(f"another process is writing to {directory}; wait for it or choose another --workdir") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure to write ``path`` into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord and ScaNN raise RuntimeError
        full = tells_of_a_full_disk(error) or _free_bytes(path) < 2**20  # ScaNN says "I/O error" of everything
        raise UserError(f"cannot write {path}: {FULL_DISK if full else error}") from error


def tells_of_a_full_disk(error: Exception) -> bool:
    """Whether that is what an error says; ArrayRecord, Orbax and TFDS tell it in their text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def sync(path: Path) -> None:
    """Makes a file's or directory's content safe from a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
