"""Defines ``UserError``, an error that the user can correct, and the code that ends a command with one line.

The line names the wrong input and how to correct it; there is no traceback.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from arrag_jax import signals

# C0 and C1 controls, line and paragraph separators, marks of text direction, and lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COMMAND = re.compile(r"python -m arrag_jax\.(\w+)")


class UserError(ValueError):
    """Invalid input, such as a flag, a config key or a file. The message names it and how to correct it."""

    code = 2  # exit code of the command

    @property
    def line(self) -> str:
        """The last line that the command prints."""
        # A few messages are indented lists, whose line ends are kept.
        return "error: " + "\n  ".join(map(printable, as_called(str(self)).split("\n  ")))


def printable(text: object) -> str:
    """Returns an untrusted text, such as a name or a caption, as one line that is safe to print and to store.

    Control characters can move a terminal's cursor or end a line. They become escapes such as ``\\n`` and ``\\x1b``.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def as_called(text: str) -> str:
    """Returns a text in which the names of ``call_commands`` replace ``python -m arrag_jax.MODULE``."""
    return COMMAND.sub(lambda found: _names.get(found[1], found[0]), text)


def call_commands(names: Mapping[str, str]) -> None:
    """Sets the command names that messages and help show.

    Args:
      names: from a module's name to what the user types for it.
    """
    global _names
    _names = names


def start_command() -> None:
    """Prepares a process that runs one of the package's commands. Call it before slow imports."""
    if sys.excepthook is not _excepthook:
        signals.start_command()
        sys.excepthook = _excepthook  # a library may install its own signal handlers during its import


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("error: interrupted", file=sys.stderr)
    sys.exit(130)


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function and exits with its code.

    A ``UserError`` becomes one line on stderr and exit code 2. For SIGINT and SIGTERM see ``signals``.
    """
    with signals.listening():
        signals.begin()
        try:
            code = main(argv) or 0
        except UserError as error:
            leave(error.line, error.code, error)
        except BaseException as error:
            number = signals.cause(error)
            if number is None:
                raise
            if _partners is None:
                signals.leave(number)
            signals.settle()
            leave(signals.closing_line(number), signals.code_of(number), signals.Stop(number))
    leave("", code)


def leave(line: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Prints a last line on stderr and exits.

    In a run of several processes, the other processes are informed first; see ``processes``.

    Args:
      line: the last line; "" prints nothing.
      code: the exit code.
      error: the error that ends the command; None if it succeeded.
    """
    if _partners is not None:
        _partners(line, code, error)  # this also prints the line
    else:
        say(line)
    signals.finished(code)
    sys.exit(code)


def say(line: str) -> None:
    """Closes all open progress bars, then prints a line on stderr; "" does nothing."""
    if not line:
        return
    with contextlib.suppress(Exception):  # the line must be printed even if closing a bar fails
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        for bar in list(getattr(bars, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr, flush=True)


_names: Mapping[str, str] = {}
_partners: Callable[[str, int, BaseException | None], None] | None = None


def take_leave_by(partners: Callable[[str, int, BaseException | None], None] | None) -> None:
    """Sets the function that ends this process in a run of several processes; None = the process runs alone."""
    global _partners
    _partners = partners
