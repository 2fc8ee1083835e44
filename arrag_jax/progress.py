"""Progress bars: on stderr, where that is a terminal, unless they are switched off."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar

_wanted = True


def show(wanted: bool) -> None:
    """Switches all bars of this process on or off; even then they appear on a terminal alone."""
    global _wanted
    _wanted = wanted


def wanted() -> bool:
    """Are bars switched on, whether or not there is a terminal to show them?"""
    return _wanted


def shown() -> bool:
    """Do bars appear?"""
    try:
        return _wanted and sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


def bar(items: Iterable[Any] | None = None, wanted: bool = True, **options: Any) -> Bar:
    """Returns a bar, over the items or over ``total=`` units that are counted by ``update``.

    Args:
      wanted: False in a process that another one shows the progress of.
      options: of ``tqdm``: desc, unit, total, initial.
    """
    return Bar(items, disable=not (wanted and shown()), dynamic_ncols=True, **options)


def tell(line: str) -> None:
    """Prints a line on stderr, above the bar where there is one."""
    Bar.write(line, file=sys.stderr)
