"""Several processes, perhaps on several hosts, that fill one folder together.

Each keeps a hidden file in the folder that changes every second. So a process that waits for another one sees whether
it lives, however long the work takes: no clock is compared, no network is needed beside the shared folder, and one that
was killed ends the others with one line instead of hanging them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from arrag_jax import signals
from arrag_jax.errors import UserError
from arrag_jax.processes import require_partner

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as dead
AGAIN = "run the same command again, in all processes, to continue"
STOPPING = " stopping"  # ends the sign of a process that was told to end
STOP_SECONDS = 90.0  # most that such a process waits for the others: they finish their shards


class Workers:
    """This process among those that fill a folder; see ``workers_in``.

    Attributes:
      index: of this process.
      count: of all processes.
    """

    def __init__(self, directory: Path, index: int, count: int):
        self.directory, self.index, self.count = directory, index, count
        self._seen: dict[int, tuple[str | None, float | None]]
        self._seen = {other: (self._sign_of(other), None) for other in range(count)}
        self._before = {other: sign for other, (sign, _) in self._seen.items()}  # what a killed run may have left
        self._stopping = False

    @property
    def leads(self) -> bool:
        """Is this the process that writes what there is only one of?"""
        return self.index == 0

    def share(self, items: range) -> range:
        """The items that are this process's own."""
        return items[self.index :: self.count]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds.

        Raises:
          UserError: another process has ended or given no sign of life for ``SILENCE`` seconds.
        """
        started = time.monotonic()
        while not condition():
            self.check()
            for other in self._others:
                self._require_alive(other, started, condition)
            time.sleep(BEAT / 10)

    def leader_has_left(self) -> bool:
        """Was the first process here, and is no more?"""
        return self._seen[0][1] is not None and self._sign_of(0) is None

    def wait_for_leader_to_leave(self) -> None:
        """Returns once the first process has left, however silent: building an index may stop its threads."""
        while self._sign_of(0) is not None:
            self.check()
            require_partner(0)
            time.sleep(BEAT)

    def check(self) -> None:
        """Raises ``signals.Stop`` where this process or another one was told to end.

        Takes note of the others' signs, so that the silence of one that dies counts from then on.
        """
        signals.check()
        if any(self._stops(other) for other in self._others):
            raise signals.Stop
        for other in self._others:
            self._note(other)

    def stop(self) -> None:
        """Tells the others that this process stops, and waits until they do, too: at most ``STOP_SECONDS``."""
        self._stopping = True
        signals.settle()
        give_up = time.monotonic() + STOP_SECONDS
        while time.monotonic() < give_up and not all(
            self._stops(other) or self._sign_of(other) in (None, self._before[other]) for other in self._others
        ):
            time.sleep(BEAT / 10)
        time.sleep(2 * BEAT)  # they read this one's sign before it goes

    @property
    def _others(self) -> set[int]:
        return set(range(self.count)) - {self.index}

    def _stops(self, other: int) -> bool:
        sign = self._sign_of(other)
        return sign is not None and sign.endswith(STOPPING) and sign != self._before[other]

    def _note(self, other: int) -> bool:
        """Takes note of a process' sign of life; is it a new one?"""
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
            raise UserError(f"process {other} of {self.count} has ended (see what it said); {AGAIN}")
        elif now - (changed or started) > SILENCE:
            raise UserError(f"process {other} of {self.count} gave no sign of life for {SILENCE:.0f} s; {AGAIN}")

    def _file(self, process: int) -> Path:
        return self.directory / f".process-{process:05d}"

    def _sign_of(self, process: int) -> str | None:
        try:
            return self._file(process).read_text()
        except FileNotFoundError:
            return None

    def _give_signs(self, stop: threading.Event) -> None:
        run, beats = uuid4().hex, 0
        while not stop.is_set():
            self._file(self.index).write_text(f"{run} {beats}{STOPPING if self._stopping else ''}")
            beats += 1
            stop.wait(BEAT)


@contextlib.contextmanager
def workers_in(directory: str | Path, index: int = 0, count: int = 1) -> Iterator[Workers]:
    """The processes that fill ``directory`` together, of which this is number ``index`` of ``count``.

    One process alone leaves no trace in the folder; several make it where it is absent. Signs that killed processes
    left there are removed once the work is done.
    """
    directory = Path(directory)
    if count == 1:
        yield Workers(directory, 0, 1)
        _remove_signs(directory, range(0, 0))
        return
    directory.mkdir(parents=True, exist_ok=True)
    workers, stop = Workers(directory, index, count), threading.Event()
    workers._file(index).unlink(missing_ok=True)  # a killed run's: no sign of this process
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
    """Removes the signs of processes that are not among the members, and so do not live."""
    for path in directory.glob(".process-*"):
        number = path.name.removeprefix(".process-")
        if number.isdecimal() and int(number) not in members:
            path.unlink(missing_ok=True)
