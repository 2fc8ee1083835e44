"""Writes one-line messages for failures of the machine: disks, permissions, memory. Each says what to do about it."""

import errno
import os
import re
from pathlib import Path

FULL_DISK = "the disk is full: free some space and run the same command again to continue"
AGAIN = "run the same command again to continue"

# Failures that concern one path: what the user can do about them.
_PLACES: dict[int | None, str] = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "something else is there already: move it away, or choose another place",
    errno.ENOTEMPTY: "something else is there already: move it away, or choose another place",
    errno.ENOTDIR: "a file stands where a folder should: move it away, or choose another place",
    errno.EISDIR: "a folder stands where a file should: move it away, or choose another place",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
    errno.EROFS: "this file system can only be read: choose another place",
    errno.ELOOP: "a link there leads back to itself: mend it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EXDEV: "choose a place that lies on one file system",
    errno.EINVAL: "choose another place",
    errno.ENXIO: "that is a device, not a file: choose another place",
    errno.ENODEV: "that is a device, not a file: choose another place",
    errno.ENOTSUP: "this file system cannot do that: choose another place",
    errno.ENOSYS: "this file system cannot do that: choose another place",
}
# Failures of the machine itself, which do not depend on the path.
_MACHINE: dict[int | None, str] = {
    errno.ENOSPC: FULL_DISK,
    errno.EDQUOT: "the quota is used up: free some space and run the same command again to continue",
    errno.EFBIG: "this file system, or a limit (ulimit -f), takes no file as large: choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many files open: close other programs",
    errno.EIO: f"the disk or its network failed: {AGAIN}",
    errno.ESTALE: f"the disk or its network failed: {AGAIN}",
    errno.ETIMEDOUT: f"the disk or its network failed: {AGAIN}",
    errno.ENOTCONN: f"the disk or its network failed: {AGAIN}",
    errno.EHOSTDOWN: f"the disk or its network failed: {AGAIN}",
    errno.EREMOTEIO: f"the disk or its network failed: {AGAIN}",
    errno.EBUSY: f"another program uses it: {AGAIN}",
    errno.ETXTBSY: f"another program uses it: {AGAIN}",
    errno.EAGAIN: f"the machine is short of something: {AGAIN}",
}
_LOOP = "Symlink loop from"  # text of the RuntimeError that pathlib raises
_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|out_of_memory|ALLOC_FAILED|bad_alloc|unable to allocate|cannot allocate memory",
    re.I,
)
_LONGEST = 300  # characters of another library's message that are shown


def code_of(error: BaseException) -> int | None:
    """Returns the errno that an error reports; None if it reports none.

    The text of the error is searched, too, because ArrayRecord, Orbax, ScaNN, TFDS and others report it only there.
    """
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    text = str(error)
    if _LOOP in text:
        return errno.ELOOP
    return next((code for code in (*_MACHINE, *_PLACES) if code and os.strerror(code) in text), None)


def tells_of_a_full_disk(error: BaseException) -> bool:
    """Returns whether an error reports a full disk."""
    return code_of(error) == errno.ENOSPC


def tells_of_memory(error: BaseException) -> bool:
    """Returns whether an error reports that the host or a device has no memory left."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if isinstance(error, OSError) or not isinstance(error, RuntimeError | ValueError):
        return False
    return code_of(error) is None and bool(_MEMORY.search(str(error)))


def is_of_the_machine(error: BaseException) -> bool:
    """Returns whether an error concerns the machine; then it does not mean that the file being read is damaged."""
    code = getattr(error, "errno", None)
    return tells_of_memory(error) or code in _MACHINE or code in (errno.EACCES, errno.EPERM, errno.ELOOP)


def explanation(error: BaseException, workdir: str | None = None) -> str | None:
    """Returns a message for an error of the file system: the path, the system's reason, and what to do about it.

    Args:
      workdir: the command's workdir, if it has one. If the path lies in it or is one of its parents, the message
        suggests another workdir.

    Returns:
      One line; None if the error is not about the file system.
    """
    code, path = code_of(error), _path_in(error)
    if code not in _MACHINE and code not in _PLACES:
        return None
    if code == errno.ENOSPC:
        return f"cannot write {path or workdir or 'the result'}: {FULL_DISK}"
    said = getattr(error, "strerror", None) or _first_line(error)
    if code in _MACHINE:
        return f"cannot read or write {path or workdir or 'a file'}: {said}; {_MACHINE[code]}"
    if workdir and path and _meets(Path(path).absolute(), Path(workdir).absolute()):
        return f"cannot write {path}: {said}; choose another --workdir"
    return f"cannot read or write {path or 'a file'}: {said}; {_PLACES[code]}"


def refused(name: str, path: str, error: OSError) -> str:
    """Returns the message for a path that the system cannot access.

    Args:
      name: the flag or config key that gives the path.
    """
    mend = _MACHINE.get(error.errno) or _PLACES.get(error.errno) or "give another path"
    return f"{name}={path}: {error.strerror}; {mend}"


def unwritable(path: Path, error: Exception, full: bool = False) -> str:
    """Returns the message for a path that cannot be written.

    Args:
      full: the disk is known to be full.
    """
    code = errno.ENOSPC if full else code_of(error)
    if code == errno.ENOSPC:
        return f"cannot write {path}: {FULL_DISK}"
    said = getattr(error, "strerror", None) or _first_line(error)
    other = _path_in(error)
    about = f" ({other})" if other and Path(other) != path and Path(other).name != f".{path.name}.tmp" else ""
    mend = _MACHINE.get(code) or _PLACES.get(code)
    return f"cannot write {path}: {said}{about}" + (f"; {mend}" if mend else "")


def out_of_memory(error: BaseException, mend: str) -> str:
    """Returns the message for an error that reports too little memory; ``mend`` says what to do about it."""
    said = _first_line(error)
    return f"out of memory{f' ({said})' if said else ''}; {mend}"


def _path_in(error: BaseException) -> str | None:
    """Returns the path that an error names; for a rename, which has two paths, the destination."""
    for name in ("filename2", "filename"):
        path = getattr(error, name, None)
        if isinstance(path, str | bytes | os.PathLike):
            return os.fsdecode(path)
    return None


def _meets(path: Path, folder: Path) -> bool:
    return folder in (path, *path.parents) or path in folder.parents


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_LONGEST] if lines else ""
