"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import contextlib
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""

    code = 2  # with which the command exits


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function: a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        code = main(argv)
    except UserError as error:
        leave(f"error: {error}", error.code, error)
    except KeyboardInterrupt as error:
        leave("error: interrupted; run the same command again to continue", 130, error)
    leave("", code or 0)


def leave(line: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Exits with this code after this last line on stderr ("": none).

    A run of several processes takes leave of its partners first, see ``processes``.
    """
    if _partners is not None:
        _partners(line, code, error)
    say(line)
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


_partners: Callable[[str, int, BaseException | None], NoReturn] | None = None


def take_leave_by(partners: Callable[[str, int, BaseException | None], NoReturn] | None) -> None:
    """Sets how this process ends in a run of several; None: as one that runs alone."""
    global _partners
    _partners = partners
