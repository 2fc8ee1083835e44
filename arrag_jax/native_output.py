"""What jax and its libraries write on stderr past Python, kept in a file; and a last line for a process that is killed.

Their accounts of a run of several processes hide the line that says what happened. From ``redirect`` on file descriptor
2 is a file, and ``sys.stderr`` is the terminal (or whatever stderr was), where bars and our own lines go.
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

# Lines of information and warnings as Google's C++ libraries log them ("I0000 00:00:1795758635.399866 …").
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
    """Sends what libraries write on stderr to a temporary file, of which ``name`` is a part. Once a process."""
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
    # a session of its own: a signal to the whole group of this process does not reach it
    _watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=terminal, start_new_session=True)
    atexit.register(farewell)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """While open, drops what C++ libraries log of their work, where the console is quiet; for a call into one.

    They write to file descriptor 2, which is a temporary file meanwhile. At the end its other lines, errors among
    them, are written out. ``sys.stderr`` and the lines of ``signals`` reach the terminal all the time.
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
    except (AttributeError, OSError, ValueError):  # one that is no file, as a test has it
        return False


def at_exit(action: Callable[[], None]) -> None:
    """Has ``action`` called when the interpreter exits, before ``farewell``."""
    atexit.register(action)


def note_traceback(error: BaseException) -> None:
    """Writes an error with its traceback to the file."""
    with contextlib.suppress(OSError):
        os.write(2, "".join(traceback.format_exception(error)).encode(errors="backslashreplace"))


def account() -> str:
    """Ends a last line: where the file is; "" while it is empty."""
    try:
        return f"; details in {_log}" if _log is not None and _log.stat().st_size else ""
    except OSError:
        return ""


def farewell(keep: bool = False) -> None:
    """Says that this process ends of its own accord; removes the file unless ``keep`` is set and it holds something."""
    global _watcher
    if _log is not None and not (keep and account()):
        _log.unlink(missing_ok=True)
    watcher, _watcher = _watcher, None
    if watcher is not None:
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            watcher.communicate(b"ended by itself", timeout=5)
