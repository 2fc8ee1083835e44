"""Errors a user can mend: one clear line that names the thing and the mend, no traceback."""

import re
import sys
from collections.abc import Callable

# C0 and C1 controls, line and paragraph separators, what reverses the text that follows, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Bad input from outside (a flag, a config key, a file). The message names it and the mend."""


def printable(text: object) -> str:
    """Returns a text from outside (a name, a caption, a reason) as one line that is safe to print and to store.

    Control characters, which move a terminal's cursor or end a line, become escapes such as ``\\n`` and ``\\x1b``.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Runs a command's main function: a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        code = main(argv)
    except UserError as error:
        lines = map(printable, str(error).split("\n"))  # a few errors are lists of ours
        print("error:", "\n".join(lines), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
