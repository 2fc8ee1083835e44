"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import contextlib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from arrag_jax import signals

# C0 and C1 controls, line and paragraph separators, what reverses the text that follows, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""

    code = 2  # with which the command exits

    @property
    def line(self) -> str:
        """The command's last line."""
        return "error: " + "\n  ".join(map(printable, str(self).split("\n  ")))  # a few errors are indented lists


def printable(text: object) -> str:
    """Returns a text from outside (a name, a caption, a reason) as one line that is safe to print and to store.

    Control characters, which move a terminal's cursor or end a line, become escapes such as ``\\n`` and ``\\x1b``.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


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


_partners: Callable[[str, int, BaseException | None], None] | None = None


def take_leave_by(partners: Callable[[str, int, BaseException | None], None] | None) -> None:
    """Sets how this process ends in a run of several; None: as one that runs alone."""
    global _partners
    _partners = partners
