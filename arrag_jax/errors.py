"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function: a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        code = main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
