"""Announces a run's checkpoints as they become complete, to whoever follows finished files (``files.followed``).

Orbax writes in the background and calls nobody after it has renamed a step, so a thread looks for the new name.
"""

import concurrent.futures
import threading
from pathlib import Path

from arrag_jax.files import finished, is_followed

POLL = 0.05  # seconds between looks


class Announcer:
    """Announces the steps of one folder, each after the one before; does nothing if nobody follows."""

    def __init__(self, directory: Path):
        self._directory, self._known, self._ended = directory, _steps(directory), threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1) if is_followed() else None
        self._last: concurrent.futures.Future | None = None

    def saving(self, step: int) -> None:
        """Announces a step, whose save has begun, as soon as it has its name; call ``wait`` before the next save."""
        if self._pool is not None:
            self._last = self._pool.submit(self._announce, step)

    def wait(self) -> None:
        """Returns when the last step is announced; raises what its follower raised."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Announces what has not been announced; call it when no step is written or removed any more."""
        self._ended.set()
        if self._pool is not None:
            self._pool.shutdown()
            self.wait()
            for step in sorted(self._known | _steps(self._directory)):
                finished(self._directory / str(step))

    def _announce(self, step: int) -> None:
        while not (self._directory / str(step)).is_dir():
            if self._ended.wait(POLL):
                return
        there = _steps(self._directory)
        for each in [*sorted(self._known - there), step]:
            finished(self._directory / str(each))
        self._known = there


def _steps(directory: Path) -> set[int]:
    return {int(path.name) for path in directory.glob("*") if path.name.isdecimal()}
