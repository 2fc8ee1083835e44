"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import contextlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from arrag_jax import signals

# C0 and C1 controls, line and paragraph separators, what reverses the text that follows, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COMMAND = re.compile(r"python -m arrag_jax\.(\w+)")


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""

    code = 2  # with which the command exits

    @property
    def line(self) -> str:
        """The command's last line."""
        # a few errors are indented lists
        return "error: " + "\n  ".join(map(printable, as_called(str(self)).split("\n  ")))


def printable(text: object) -> str:
    """Returns a text from outside (a name, a caption, a reason) as one line that is safe to print and to store.

    Control characters, which move a terminal's cursor or end a line, become escapes such as ``\\n`` and ``\\x1b``.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def as_called(text: str) -> str:
    """Returns a text whose ``python -m arrag_jax.MODULE`` are spelt as ``call_commands`` set, else as they stand."""
    return COMMAND.sub(lambda found: _names.get(found[1], found[0]), text)


def call_commands(names: Mapping[str, str]) -> None:
    """Sets how messages and help call the package's commands: from a module's name to what a user types."""
    global _names
    _names = names


def start_command() -> None:
    """Prepares a process that is one of the package's commands, before it imports what takes long."""
    if sys.excepthook is not _excepthook:
        signals.start_command()
        sys.excepthook = _excepthook  # a library may take the signals while it is imported


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("error: interrupted", file=sys.stderr)
    sys.exit(130)


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function and exits with its code.

    A ``UserError`` becomes one line on stderr and exit code 2. SIGINT and SIGTERM end the command as ``signals`` says.
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
    """Exits with this code after this last line on stderr ("": none).

    A run of several processes takes leave of its partners first, see ``processes``.

    Args:
      error: because of which the command ends.
    """
    if _partners is not None:
        _partners(line, code, error)  # prints the line, too
    else:
        say(line)
    signals.finished(code)
    sys.exit(code)


def say(line: str) -> None:
    """Prints a line on stderr, below the progress bars that are open. They are closed; "" prints nothing."""
    if not line:
        return
    with contextlib.suppress(Exception):  # a bar's own troubles are no reason to lose the line
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        for bar in list(getattr(bars, "_instances", ())):
            bar.close()
    print(line, file=sys.stderr, flush=True)


_names: Mapping[str, str] = {}
_partners: Callable[[str, int, BaseException | None], None] | None = None


def take_leave_by(partners: Callable[[str, int, BaseException | None], None] | None) -> None:
    """Sets how this process ends in a run of several; None: as one that runs alone."""
    global _partners
    _partners = partners
