"""Shows progress bars on stderr, if stderr is a terminal and bars are switched on."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar

_wanted = True


def show(wanted: bool) -> None:
    """Switches all bars of this process on or off; bars that are on appear only on a terminal."""
    global _wanted
    _wanted = wanted


def wanted() -> bool:
    """Returns whether bars are switched on, even if there is no terminal to show them."""
    return _wanted


def shown() -> bool:
    """Returns whether bars appear: they are switched on, and stderr is a terminal."""
    try:
        return _wanted and sys.stderr.isatty()
    except (AttributeError, ValueError):  # stderr is missing or closed
        return False


def bar(items: Iterable[Any] | None = None, wanted: bool = True, **options: Any) -> Bar:
    """Returns a progress bar over the items, or over ``total=`` units that ``update`` counts.

    Args:
      wanted: False hides the bar, for a process whose progress another process shows.
      options: options of ``tqdm``: desc, unit, total, initial.
    """
    return Bar(items, disable=not (wanted and shown()), dynamic_ncols=True, **options)


def tell(line: str) -> None:
    """Prints a line on stderr, above the bar if there is one."""
    Bar.write(line, file=sys.stderr)
