"""Redirects what C++ libraries write on stderr to a file, and prints a last line for a process that is killed.

In a run of several processes, the output of jax and its libraries would hide the line that says what happened. After
``redirect``, file descriptor 2 is a file. ``sys.stderr`` remains the terminal (or what stderr was before), and shows
progress bars and this package's own lines.
"""

import atexit
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arrag_jax import console, signals

# Info and warning lines in the log format of Google's C++ libraries ("I0000 00:00:1795758635.399866 …").
_CHATTER = re.compile(rb"([IW]\d{4} |WARNING: All log messages before absl::InitializeLog\(\))")
_log: Path | None = None
_watcher: subprocess.Popen | None = None

WATCHER = """
import os, sys
log, line = sys.argv[1:]
if sys.stdin.read():
    sys.exit()
if os.path.exists(log) and os.path.getsize(log):
    line += "; details in " + log
elif os.path.exists(log):
    os.unlink(log)
print("\\n" + line, file=sys.stderr)  # a progress bar may stand in the line
"""
LINE = (
    "error: this process ended before its work was done, because it was killed or it crashed; start all processes "
    "again with the same command to continue"
)


def redirect(name: str) -> None:
    """Redirects what libraries write on stderr to a temporary file, with ``name`` in its name; once per process."""
    global _log, _watcher
    if _log is not None:
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    terminal = os.dup(2)
    file, path = tempfile.mkstemp(prefix=f"arrag_jax_{name}_", suffix=".log")
    os.dup2(file, 2)
    os.close(file)
    _log = Path(path)
    encoding, errors = getattr(sys.stderr, "encoding", "utf-8"), getattr(sys.stderr, "errors", "backslashreplace")
    signals.write_to(terminal)
    sys.stderr = io.TextIOWrapper(os.fdopen(terminal, "wb", 0), encoding, errors, write_through=True)
    command = [sys.executable, "-S", "-c", WATCHER, path, LINE]
    # The watcher gets its own session, so that a signal to this process group does not reach it.
    _watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=terminal, start_new_session=True)
    atexit.register(farewell)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """While open, and if the console is quiet, drops info and warning lines of C++ libraries.

    The libraries write to file descriptor 2, which is a temporary file while this is open. On exit its other lines,
    including errors, are written to the terminal. ``sys.stderr`` and the lines of ``signals`` always reach the
    terminal.
    """
    if _log is not None or not console.is_quiet():
        yield
        return
    stderr = sys.stderr
    with contextlib.suppress(OSError, ValueError):
        stderr.flush()
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2), "wb", 0) as terminal:
        os.dup2(file.fileno(), 2)
        signals.write_to(terminal.fileno())
        own: io.TextIOWrapper | None = None
        if _is_descriptor_2(stderr):
            sys.stderr = own = io.TextIOWrapper(terminal, stderr.encoding, stderr.errors, write_through=True)
        try:
            yield
        finally:
            if own is not None:
                own.detach()
                sys.stderr = stderr
            os.dup2(terminal.fileno(), 2)
            signals.write_to(2)
            file.seek(0)
            terminal.write(b"".join(line for line in file if not _CHATTER.match(line)))


def _is_descriptor_2(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):  # a stream that is not a file, as in a test
        return False


def at_exit(action: Callable[[], None]) -> None:
    """Registers ``action`` to be called when the interpreter exits, before ``farewell``."""
    atexit.register(action)


def note_traceback(error: BaseException) -> None:
    """Writes an error with its traceback to the file of ``redirect``."""
    with contextlib.suppress(OSError):
        os.write(2, "".join(traceback.format_exception(error)).encode(errors="backslashreplace"))


def account() -> str:
    """Returns the end of a last line, which names the file of ``redirect``; "" if the file is empty."""
    try:
        return f"; details in {_log}" if _log is not None and _log.stat().st_size else ""
    except OSError:
        return ""


def farewell(keep: bool = False) -> None:
    """Tells the watcher that this process ends normally, and removes the file.

    Args:
      keep: keep the file if it is not empty.
    """
    global _watcher
    if _log is not None and not (keep and account()):
        _log.unlink(missing_ok=True)
    watcher, _watcher = _watcher, None
    if watcher is not None:
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            watcher.communicate(b"ended by itself", timeout=5)
