"""Lets several processes, possibly on several hosts, fill one folder together.

Each process writes a heartbeat to a hidden file of the folder every second. A process that waits for another one thus
sees whether that one is alive, however long the work takes. This needs no common clock, and no network except the
shared folder. If a process is killed, the others end with a one-line error instead of waiting forever.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from arrag_jax import signals
from arrag_jax.errors import UserError
from arrag_jax.processes import require_partner

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 30.0  # timeout: seconds without a heartbeat after which a process counts as dead
AGAIN = "run the same command again, in all processes, to continue"
STOPPING = " stopping"  # suffix of the heartbeat of a process that is stopping after a signal
STOP_SECONDS = 90.0  # time limit for a stopping process to wait until the others finish their shards


class Workers:
    """This process among those that fill a folder; see ``workers_in``.

    Attributes:
      directory: the folder.
      index: number of this process, from 0.
      count: number of processes.
    """

    def __init__(self, directory: Path, index: int, count: int):
        self.directory, self.index, self.count = directory, index, count
        self._seen: dict[int, tuple[str | None, float | None]]
        self._seen = {other: (self._sign_of(other), None) for other in range(count)}
        self._before = {other: sign for other, (sign, _) in self._seen.items()}  # may be left by a killed run
        self._stopping = False
        self._run, self._beats = uuid4().hex, itertools.count()

    @property
    def leads(self) -> bool:
        """Whether this process is the leader: it alone writes the files that belong to no shard."""
        return self.index == 0

    def share(self, items: range) -> range:
        """Returns the items that this process handles."""
        return items[self.index :: self.count]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds.

        Raises:
          UserError: if another process has ended, or has had no heartbeat for ``SILENCE`` seconds.
        """
        started = time.monotonic()
        while not condition():
            self.check()
            for other in self._others:
                self._require_alive(other, started, condition)
            time.sleep(BEAT / 10)

    def leader_has_left(self) -> bool:
        """Returns whether the leader had a heartbeat and has removed it since."""
        return self._seen[0][1] is not None and self._sign_of(0) is None

    def wait_for_leader_to_leave(self) -> None:
        """Waits until the leader has removed its heartbeat.

        There is no timeout, because the leader's heartbeat thread may stop while it builds an index.
        """
        while self._sign_of(0) is not None:
            self.check()
            require_partner(0)
            time.sleep(BEAT)

    def check(self) -> None:
        """Raises ``signals.Stop`` if this process or another one must stop.

        Also records the heartbeats of the others, from which their timeouts are measured.
        """
        signals.check()
        if any(self._stops(other) for other in self._others):
            raise signals.Stop
        for other in self._others:
            self._note(other)

    def stop(self) -> None:
        """Announces that this process stops, and waits up to ``STOP_SECONDS`` until the others stop too."""
        self._stopping = True
        signals.settle()
        give_up = time.monotonic() + STOP_SECONDS
        while time.monotonic() < give_up and not all(
            self._stops(other) or self._sign_of(other) in (None, self._before[other]) for other in self._others
        ):
            time.sleep(BEAT / 10)
        time.sleep(2 * BEAT)  # gives the others time to read this heartbeat before it is removed

    @property
    def _others(self) -> set[int]:
        return set(range(self.count)) - {self.index}

    def _stops(self, other: int) -> bool:
        sign = self._sign_of(other)
        return sign is not None and sign.endswith(STOPPING) and sign != self._before[other]

    def _note(self, other: int) -> bool:
        """Records the heartbeat of a process and returns whether it has changed."""
        sign = self._sign_of(other)
        new = sign is not None and sign != self._seen[other][0]
        if new:
            self._seen[other] = sign, time.monotonic()
        return new

    def _require_alive(self, other: int, started: float, condition: Callable[[], bool]) -> None:
        if self._note(other):
            return
        sign, now = self._sign_of(other), time.monotonic()
        _, changed = self._seen[other]
        if sign is None and changed is not None and not condition():
            raise UserError(f"process {other} of {self.count} has ended (its own last line says why); {AGAIN}")
        elif now - (changed or started) > SILENCE:
            raise UserError(f"process {other} of {self.count} gave no sign of life for {SILENCE:.0f} s; {AGAIN}")

    def _file(self, process: int) -> Path:
        return self.directory / f".process-{process:05d}"

    def _sign_of(self, process: int) -> str | None:
        try:
            return self._file(process).read_text()
        except FileNotFoundError:
            return None

    def _give_sign(self) -> None:
        self._file(self.index).write_text(f"{self._run} {next(self._beats)}{STOPPING if self._stopping else ''}")

    def _give_signs(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT):
            self._give_sign()


@contextlib.contextmanager
def workers_in(directory: str | Path, index: int = 0, count: int = 1) -> Iterator[Workers]:
    """Yields the workers that fill ``directory`` together; this process is number ``index`` of ``count``.

    A single process writes no heartbeat and does not create the folder; several processes create it if it is absent.
    Heartbeat files of killed processes are removed when the work is done.
    """
    directory = Path(directory)
    if count == 1:
        yield Workers(directory, 0, 1)
        _remove_signs(directory, range(0, 0))
        return
    directory.mkdir(parents=True, exist_ok=True)
    workers, stop = Workers(directory, index, count), threading.Event()
    workers._give_sign()  # replaces the one that a killed run may have left
    thread = threading.Thread(target=workers._give_signs, args=(stop,), daemon=True)
    thread.start()
    try:
        yield workers
        if workers.leads:
            _remove_signs(directory, range(count))
    except signals.Stop:
        workers.stop()
        raise
    finally:
        stop.set()
        thread.join()
        workers._file(index).unlink(missing_ok=True)


def _remove_signs(directory: Path, members: range) -> None:
    """Removes the heartbeat files of processes that are not members, because those are dead."""
    for path in directory.glob(".process-*"):
        number = path.name.removeprefix(".process-")
        if number.isdecimal() and int(number) not in members:
            path.unlink(missing_ok=True)
