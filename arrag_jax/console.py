"""Makes output safe on any console: one without UTF-8, one that is closed early, or none at all.

It also keeps the log messages of libraries off the console.
"""

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

CLOSED = 141  # exit code that shells report for a program that SIGPIPE has ended
UNWRITABLE = 2
LOST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # errors of a file that stdout is redirected to
_quiet = False


def quiet(wanted: bool) -> None:
    """Hides the log messages of libraries if ``wanted``, else shows all of them.

    Errors are always shown. Before the first call libraries log as they do without this package.
    """
    global _quiet
    _quiet = wanted
    absl_logging.set_verbosity(absl_logging.ERROR if wanted else absl_logging.INFO)
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_advice)  # adding the same filter again has no effect


def is_quiet() -> bool:
    """Returns whether the log messages of libraries are hidden."""
    return _quiet


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Returns False for JAX's hint on a CPU machine that an accelerator "may be present", else True."""
    return not (_quiet and "may be present on this machine" in record.getMessage())


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """While open, and if the console is quiet, drops what a library prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) if _quiet else contextlib.nullcontext():
        yield


def prepare() -> None:
    """Makes stdout and stderr accept any text; characters outside their encoding become escapes ("\\u03bb")."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (2>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the program ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Flushes stdout and stderr on exit, and handles a stdout that cannot be written.

    If the reader has closed the pipe, as in ``| head``, the program ends without a message and with exit code 141. If
    stdout cannot be written for another reason, such as a full disk, one line reports it.
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
    """Returns whether an error, or an error that caused it, is a closed output pipe."""
    while error is not None:
        if isinstance(error, BrokenPipeError) or "BrokenPipeError" in str(error):  # jax gives only the text
            return True
        error = error.__cause__ or error.__context__
    return False


def _drop_unwritten() -> None:
    """Redirects streams that cannot be written to the null device, so that the interpreter can exit without errors."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
