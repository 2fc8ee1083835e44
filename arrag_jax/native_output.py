"""What jax and its libraries write on stderr past Python, kept in a file; and a last line for a process that is killed.

Their accounts of a run of several processes hide the line that says what happened. From ``redirect`` on file descriptor
2 is a file, and ``sys.stderr`` is the terminal (or whatever stderr was), where bars and our own lines go.
"""

import atexit
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from arrag_jax import signals

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
