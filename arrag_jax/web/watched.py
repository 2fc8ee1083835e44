"""Builds that say how far they are, for pages that show it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from arrag_jax.work import HERE, Engine, Report, Work, Worker


class Watched:
    """The engine of a build in this process that others can look at; a ``work.Engine``.

    Attributes:
      leads: this process is alone.
    """

    leads = True

    def __init__(self) -> None:
        self._label, self._unit = "", "image"
        self._before, self._done, self._total, self._start = 0, 0, 0, time.monotonic()

    def meet(self, what: str, value: str = "") -> str:
        """Returns ``value``."""
        return value

    def alone(self) -> Engine:
        """Returns itself."""
        return self

    def run(self, work: Work) -> Iterator[tuple[Any, Any]]:
        """Works as ``work.HERE`` does, and counts."""
        left = sum(work.sizes[item] for item in work.items)
        self._total = sum(work.sizes.values())
        self._before = self._done = self._total - left
        self._label, self._unit, self._start = work.label, work.unit, time.monotonic()
        return HERE.run(dataclasses.replace(work, make_worker=functools.partial(self._counting, work.make_worker)))

    def _counting(self, make_worker: Callable[[], Worker]) -> Worker:
        worker = make_worker()
        return lambda item, report: worker(item, _Counted(self, report))

    def count(self, units: int) -> None:
        """Adds finished units of the present step."""
        self._done += units

    def told(self) -> str:
        """Returns how far the present step is, with the seconds that it needs from here; "" before the first one."""
        if not self._total:
            return ""
        new = self._done - self._before
        seconds = (time.monotonic() - self._start) / new * (self._total - self._done) if new else None
        left = "" if seconds is None else f", {seconds:.0f} s left"
        return f"{self._label}: {self._done:,} of {self._total:,} {self._unit}s{left}"


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A ``work.Report`` that also counts for the page."""

    watched: Watched
    report: Report

    def count(self, units: int) -> None:
        self.watched.count(units)
        self.report.count(units)

    def tell(self, line: str) -> None:
        self.report.tell(line)
