"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import re
import sys
from collections.abc import Callable

# What would break a line or change a terminal: a file's name, or another library's message, may hold it.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend, in one line."""

    def __str__(self) -> str:
        return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), super().__str__())


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
