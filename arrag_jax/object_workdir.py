"""Writes a folder at an address of object storage: a command works in a local mirror, and what it finishes is sent.

At the start the mirror becomes what is finished at the address. Then each file is sent when it is finished
(``files.finished``); one object appears as a whole. A folder that is only whole as a whole (a checkpoint, an export, an
index) has the object ``.unfinished`` in it while its files are sent, its JSON files last: who reads the address, or
continues from it, leaves such a folder out. Files that grow, such as logs, are sent with each checkpoint and at
the end.

The object ``.lock`` names the command that writes there. It is renewed while that command runs.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.files import exclusive_lock, followed, removed
from arrag_jax.meeting import is_one_of_several
from arrag_jax.object_storage import (
    CACHE,
    LOCK,
    UNFINISHED,
    Copy,
    Object,
    client,
    copy_of,
    explained,
    is_address,
    listed,
    named,
    object_of,
    without_unfinished,
)

RENEWED = 10.0  # seconds after which the lock is renewed
LEASE = 45.0  # seconds without renewal after which a lock is that of a command that has died
SEVERAL = "is written by one process, and this run has several; mount the bucket on all machines, and give the folder"
_OWN = re.compile(r"\..*\.(tmp|old)|.*\.orbax-checkpoint-tmp.*")  # names of what is not finished yet
_STEP = re.compile(r"checkpoints/\d+(?=/)")


@contextlib.contextmanager
def opened(address: str) -> Iterator[Path]:
    """Yields the local mirror of an address; what is finished there while this is open is sent.

    At the end, also at an error, the address holds what the mirror holds.

    Raises:
      UserError: if another command writes there, access is refused, or the storage cannot be reached.
    """
    copy = copy_of(address, "workdirs")
    refusal = f"another command on this machine writes to {address}; wait for it, or choose another address"
    with exclusive_lock(copy.home, refusal=refusal), _locked(address) as lock:
        mirror = Mirror(copy, lock)
        mirror.begin()
        progress.tell(f"{address} is worked on in {copy.folder} ({CACHE} sets where)")
        with followed(mirror.finished):
            try:
                yield copy.folder
            except SystemExit:  # training ends so at SIGTERM, once it has saved
                mirror.send_all()
                raise
            except BaseException:
                with contextlib.suppress(UserError):  # what the user must read is the first error
                    mirror.send_all()
                raise
            mirror.send_all()


@contextlib.contextmanager
def mirrored(values: dict[str, Any], names: Collection[str]) -> Iterator[Callable[[], None]]:
    """Replaces each address among these flags, in place, by its mirror; messages name addresses, also those read.

    Args:
      values: flags by name.
      names: those that may be an address.

    Yields:
      A function that raises UserError if there is an address and JAX knows of several processes.

    Raises:
      UserError: as in ``opened``, or if several processes or Ray share the work: each machine has its own mirror.
    """
    addresses = {name: values[name] for name in names if is_address(values.get(name) or "")}
    with contextlib.ExitStack() as stack:
        for name, address in addresses.items():
            if values.get("ray"):
                raise UserError(f"--{name}={address} is written by one process; leave --ray out, or mount the bucket")
            if is_one_of_several() or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
                raise UserError(f"--{name}={address} {SEVERAL}")
            values[name] = str(stack.enter_context(opened(address)))
        try:
            yield functools.partial(_require_one, addresses)
        except UserError as error:
            said = named(str(error))
            if said == str(error):
                raise
            raise UserError(said) from error


def _require_one(addresses: dict[str, str]) -> None:
    if addresses and jax.process_count() > 1:
        raise UserError(f"{next(iter(addresses.values()))} {SEVERAL}")


class Mirror:
    """The mirror of one address, and what is at the address."""

    def __init__(self, copy: Copy, lock: "_Lock"):
        self._copy, self._lock, self._sending = copy, lock, threading.RLock()
        self._open: set[str] = set()  # folders that are marked as unfinished at the address

    def begin(self) -> None:
        """Makes the mirror equal to what is finished at the address, and removes there what is not."""
        there = listed(self._copy.address)
        whole = without_unfinished(there)
        for name in sorted(set(there) - set(whole) - {LOCK}, key=lambda name: name.endswith(UNFINISHED)):
            self._remove(name)
        folder = self._copy.folder
        self._copy.prune(whole)
        self._copy.bring(whole)
        folder.mkdir(parents=True, exist_ok=True) if whole else removed(folder)

    def finished(self, path: Path) -> None:
        """Sends a finished file or folder of the mirror; of one that is gone, its objects are removed."""
        folder = self._copy.folder
        if (path != folder and folder not in path.parents) or path.is_symlink():
            return
        parts = path.relative_to(folder).parts
        if any(map(_OWN.fullmatch, parts)):
            return
        name = "/".join(parts)
        with self._sending:
            if path.is_file():
                self._remove_gone(path.parent)
                self._send(name)
            else:
                self._send_folder(name)
                if _STEP.match(f"{name}/"):
                    self._send_logs()

    def send_all(self) -> None:
        """Makes the address equal to the mirror."""
        with self._sending:
            files = self._files("")
            steps = {match[0] for name in {*files, *self._copy.known} if (match := _STEP.match(name))}
            for folder in sorted(steps | self._open):
                self._send_folder(folder)
            self._send_logs()
            for name in sorted(set(self._copy.known) - set(files)):
                self._remove(name)

    def _send_logs(self) -> None:
        """Sends what has changed outside checkpoints: files that grow, and those that libraries write."""
        for name in self._changed(self._files("")):
            if not _STEP.match(name):
                self._send(name)

    def _send_folder(self, name: str) -> None:
        """Sends a folder whose parts mean nothing alone."""
        prefix = f"{name}/" if name else ""
        files, known = self._files(prefix), [x for x in self._copy.known if x.startswith(prefix)]
        gone, changed = sorted(set(known) - set(files)), self._changed(files)
        if not gone and not changed and name not in self._open:
            return
        mark = f"{prefix}{UNFINISHED}"
        self._open.add(name)
        self._put(mark, None)
        for each in gone:
            self._remove(each)
        for each in sorted(changed, key=lambda x: (x.endswith(".json"), x.endswith("manifest.json"), x)):
            self._send(each)
        self._remove(mark)
        self._open.discard(name)

    def _files(self, prefix: str) -> list[str]:
        """Returns the names of the mirror's files that begin so, without temporary ones."""
        folder, found = self._copy.folder, []
        for top, folders, files in os.walk(folder / prefix):
            folders[:] = [each for each in folders if not _OWN.fullmatch(each)]
            paths = [Path(top, each) for each in files if not _OWN.fullmatch(each)]
            found += [path.relative_to(folder).as_posix() for path in paths if not path.is_symlink()]
        return sorted(found)

    def _changed(self, files: list[str]) -> list[str]:
        known = self._copy.known
        return self._copy.lacks({name: known[name][0] if name in known else Object(-1, "") for name in files})

    def _remove_gone(self, parent: Path) -> None:
        """Removes the objects of files that are not in this folder of the mirror any more."""
        there, prefix = set(os.listdir(parent)), "/".join(parent.relative_to(self._copy.folder).parts)
        for name in list(self._copy.known):
            if name.rpartition("/")[0] == prefix and name.rpartition("/")[2] not in there:
                self._remove(name)

    def _send(self, name: str) -> None:
        path, before = self._copy.path(name), self._copy.path(name).stat()
        sent = self._put(name, path)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            self._copy.note(name, sent)
        else:  # it grows: it is sent again
            self._copy.known[name] = (sent, -1, 0)

    def _put(self, name: str, path: Path | None) -> Object:
        """Writes an object with the content of a file; None = nothing."""
        self._lock.require()
        target = f"{self._copy.address}/{name}"
        with explained(target, "writing it"):
            if path is None:
                client(target).pipe_file(target, b"")
            else:
                client(target).put_file(str(path), target)
            return object_of(client(target).info(target))

    def _remove(self, name: str) -> None:
        self._lock.require()
        target = f"{self._copy.address}/{name}"
        with explained(target, "removing it"), contextlib.suppress(FileNotFoundError):
            client(target).rm_file(target)
        self._copy.note(name, None)


@dataclasses.dataclass
class _Lock:
    """The lock of this command at an address."""

    address: str
    content: dict[str, Any]
    lost: str = ""

    def require(self) -> None:
        """Raises UserError if another command has taken the lock, because this one did not renew it for too long."""
        if self.lost:
            raise UserError(self.lost)

    def renew(self, ended: threading.Event) -> None:
        """Renews the lock until an event is set."""
        while not ended.wait(RENEWED):
            with contextlib.suppress(Exception):  # the next time may do
                found = _read_lock(self.address)
                if found is None or found.get("id") != self.content["id"]:
                    self.lost = f"another command has taken over {self.address}, because this one was not heard of"
                    return
                _write_lock(self.address, self.content)


@contextlib.contextmanager
def _locked(address: str) -> Iterator[_Lock]:
    """Holds the lock of an address; takes over that of a command that has died."""
    lock = _Lock(address, {"id": uuid.uuid4().hex, "host": _machine(), "pid": os.getpid()})
    with explained(f"{address}/{LOCK}", "writing it"):
        try:
            _write_lock(address, lock.content, mode="create")
        except FileExistsError:
            _require_dead(address)
            _write_lock(address, lock.content)
    ended = threading.Event()
    thread = threading.Thread(target=lock.renew, args=(ended,), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        if not lock.lost:
            with contextlib.suppress(Exception):  # it runs out by itself
                client(address).rm_file(f"{address}/{LOCK}")


def _require_dead(address: str) -> None:
    """Raises UserError if the command that holds the lock of an address is alive."""
    found = _read_lock(address)
    if found is None:
        return
    who = f"process {found.get('pid')} on {str(found.get('host')).partition(' ')[0]}"
    refusal = UserError(f"{address} is written by another command ({who}); wait for it, or choose another address")
    if found.get("host") == _machine():
        if _is_alive(found.get("pid")):
            raise refusal
        return
    progress.tell(f"{address} was written by {who}; waiting {LEASE:.0f} s to see whether that command still runs")
    first, end = found.get("time"), time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(min(1.0, LEASE))
        found = _read_lock(address)
        if found is None:
            return
        if found.get("time") != first:
            raise refusal


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return False
    return True


def _machine() -> str:
    """Returns a name of this machine since it was started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
    started = boot.read_text(encoding="utf-8").strip() if boot.is_file() else ""
    return f"{socket.gethostname()} {started} {space}"


def _read_lock(address: str) -> dict[str, Any] | None:
    """Returns what the lock says; None if there is none."""
    try:
        found = json.loads(client(address).cat_file(f"{address}/{LOCK}"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_lock(address: str, content: dict[str, Any], **options: Any) -> None:
    text = json.dumps({**content, "time": time.time()})
    client(address).pipe_file(f"{address}/{LOCK}", text.encode(), **options)
