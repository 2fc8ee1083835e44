"""The console as a command finds it: without UTF-8, closed before the command ends, or not there at all."""

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

CLOSED = 141  # exit code of a program that SIGPIPE ends, as shells give it
UNWRITABLE = 2
LOST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what the file says that stdout is sent into
_quiet = False


def quiet(wanted: bool) -> None:
    """Keeps what libraries report of their own work off the console, or (False) lets all of it through.

    Errors always pass. Until the first call libraries behave as they do without this package.
    """
    global _quiet
    _quiet = wanted
    absl_logging.set_verbosity(absl_logging.ERROR if wanted else absl_logging.INFO)
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_advice)  # which adds the same filter once


def is_quiet() -> bool:
    """Is what libraries report kept off the console?"""
    return _quiet


def _is_no_advice(record: logging.LogRecord) -> bool:
    """False for JAX's advice on a CPU machine, that an accelerator "may be present"; failures of one pass."""
    return not (_quiet and "may be present on this machine" in record.getMessage())


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """While open, drops what a library prints on stdout, where the console is quiet."""
    with contextlib.redirect_stdout(io.StringIO()) if _quiet else contextlib.nullcontext():
        yield


def prepare() -> None:
    """Lets stdout and stderr take any text: what their encoding lacks is written as an escape ("\\u03bb")."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (2>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the program ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Writes out what was printed before the program ends, and ends it quietly where nobody reads it any more.

    A reader that has closed its end of the pipe (``| head``) is no error of the command: exit code 141. Where stdout
    cannot be written for another reason (a full disk), one line says so.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        _drop_unwritten()
        sys.exit(CLOSED)
    except OSError as error:
        if error.filename is not None or error.errno not in LOST:
            raise
        _drop_unwritten()
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(UNWRITABLE)


def is_closed(error: BaseException | None) -> bool:
    """Tells whether an error, or what it was raised from, is that nobody reads the output any more."""
    while error is not None:
        if isinstance(error, BrokenPipeError) or "BrokenPipeError" in str(error):  # jax tells it in text alone
            return True
        error = error.__cause__ or error.__context__
    return False


def _drop_unwritten() -> None:
    """Sends the streams that cannot be written into nothing, so that the interpreter's end does not fail on them."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
