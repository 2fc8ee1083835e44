"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import sys
from collections.abc import Callable

from arrag_jax import signals


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function and exits with its code.

    A ``UserError`` becomes one line on stderr and exit code 2. SIGINT and SIGTERM end the command as ``signals`` says.
    """
    with signals.listening():
        signals.begin()
        try:
            code = main(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except BaseException as error:
            number = signals.cause(error)
            if number is None:
                raise
            signals.leave(number)
    signals.finished(code)
    sys.exit(code)
