"""Starts and ends the processes of a run of several processes.

Before jax starts, all processes connect to the hub (``hub.py``) at the coordinator's address. One line reports a
process that is missing, is started twice or has another config. The processes stay connected to the hub. If one dies or
fails, the others end at once, with a line that names it. The output of jax and its libraries, such as C++ stack traces,
goes to a file (``native_output``).
"""

import contextlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from arrag_jax import errors, hub, native_output, signals
from arrag_jax.errors import UserError, say
from arrag_jax.meeting import Place, described, meet, start_jax

PATIENCE = 40  # heartbeat timeout in seconds: a process that is silent for longer counts as dead, and all others end
WAIT = 60.0  # seconds within which all processes must connect
GRACE = 3.0  # seconds to end with an own error after another process has failed
STOP_SECONDS = 90.0  # seconds that a stopped process waits for the others to finish what they are at
LAST_STEPS = 5.0  # seconds for the interpreter to shut down after a complete run
AGAIN = "start all processes again with the same command to continue"


class PartnerEnded(UserError):
    """An error that says that another process of the run ended before its work was done."""

    def __init__(self, failure: Mapping[str, Any], count: int):
        because = failure["line"].removeprefix("error: ")
        if failure["code"] is not None:
            because = f"process {failure['index']} of {count} ended with: {because}"
            self.code = failure["code"]
        line = f"error: this process ended before its work was done, because {because}; {AGAIN}"
        self._line = failure["line"] if failure.get("stopped") else line
        super().__init__(self._line.removeprefix("error: "))

    @property
    def line(self) -> str:
        return self._line


def start_distributed(
    patience: float = PATIENCE, wait: float = WAIT, settings: Mapping[str, Any] | None = None, together: bool = True
) -> None:
    """Connects the processes of a run; does nothing in a run of one process.

    Call it before anything else uses jax. A run has several processes if JAX_COORDINATOR_ADDRESS is set, together with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or if SLURM, Open MPI or a TPU pod says so. If a process dies or fails, the
    others also end, and their last line says why.

    Args:
      patience: heartbeat timeout in seconds, after which a silent process counts as dead.
      wait: seconds within which all processes must connect.
      settings: JSON values by name that must be equal in all processes.
      together: each process needs all others all the time. If False, a process continues when others fail, until it
        waits for them in ``require_same`` or ``from_first``.

    Raises:
      UserError: if a process is missing, is started twice or has other settings, or the environment is inconsistent.
    """
    global _run
    if not wait > 0:
        raise UserError(f"--wait={wait:g} must be above 0 seconds")
    place = described(wait) if _run is None else None
    if place is None:
        return
    native_output.redirect(f"process_{place.index}")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    channel, messages = meet(place, patience, wait, settings=versions | dict(settings or {}), together=together)
    _run = Run(place, channel, patience, together)
    errors.take_leave_by(_run.leave)
    signals.together(_run.stopping if together else None, _run.ask_to_stop)
    signals.before_the_end(_run.end_at_once)
    sys.excepthook = _run.fail
    threading.Thread(target=_run.listen, args=(messages,), name="partners", daemon=True).start()
    start_jax(place, patience)
    native_output.at_exit(_run.leave_at_exit)


def require_same(values: Mapping[str, str], what: str) -> None:
    """Waits until every process of the run has called this, and checks that all gave the same values.

    Args:
      values: the values, by their names in messages.
      what: name of the call; every process must make the same calls.

    Raises:
      UserError: if the values differ.
      PartnerEnded: if another process has ended.
    """
    if _run is not None:
        _run.require_same(dict(values), what)


def from_first(value: str, what: str) -> str:
    """Waits until every process of the run has called this, and returns the value that process 0 gave.

    Args:
      value: the value of this process.
      what: as in ``require_same``.

    Raises:
      PartnerEnded: if another process has ended.
    """
    return value if _run is None else _run.gather({"value": value}, what)[0]["value"]


def place() -> Place | None:
    """Returns the place of this process in its run; None if it runs alone."""
    return None if _run is None else _run.place


class Run:
    """The state of this process in a run of several processes. ``listen`` runs in its own thread."""

    def __init__(self, place: Place, channel: Any, patience: float, together: bool):
        self.place, self.patience, self.together = place, patience, together
        self.failures: dict[int, dict[str, Any]] = {}  # by process, in order of arrival
        self._stop_asked: int | None = None
        self._channel, self._sending = channel, threading.Lock()
        self._steps, self._stop_at, self._stepping = 0, None, threading.Lock()
        self._news = threading.Condition()
        self._values: dict[str, list[dict[str, str]]] = {}
        self._noted, self._over = False, None  # the hub knows our end; whether all finished, None until the run is over
        self._leaving = threading.Lock()  # held by the thread that ends this process

    # Messages from the hub

    def listen(self, messages: list[dict[str, Any]]) -> None:
        """Handles these messages, then all messages of the hub until its connection closes."""
        try:
            while True:
                for message in messages:
                    self._take(message)
                if self._stop_asked is not None:
                    number, self._stop_asked = self._stop_asked, None
                    self._send("stop", number=number)
                messages = self._channel.receive(0.2)
        except OSError:
            words = f"process 0 of {self.place.count} died, or its machine is out of reach"
            self._note_failure({"index": 0, "line": words, "code": None})

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "ping":
            self._send("pong")
        elif kind == "failed":
            self._note_failure(message)
        elif kind == "stop":
            if not self._leaving.locked():
                signals.hand_over(message["number"])
            if self.together:
                self._stepping.acquire()  # blocks further steps until all processes have reported their step
                self._send("step", step=self._steps)
        elif kind == "stop_at":
            self._stop_at = message["step"]
            self._stepping.release()
        with self._news:
            if kind == "values":
                self._values[message["name"]] = message["values"]
            self._noted |= kind == "noted"
            if kind == "over":
                self._over = message["clean"]
            self._news.notify_all()

    def _note_failure(self, failure: dict[str, Any]) -> None:
        with self._news:
            first = not self.failures
            self.failures.setdefault(failure["index"], failure)
            self._news.notify_all()
        if first and self.together:
            threading.Timer(GRACE, self._end_for_partner).start()

    def _send(self, kind: str, **content: Any) -> None:
        with self._sending:
            self._channel.send(kind, **content)

    def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        with self._news:
            return self._news.wait_for(condition, seconds)

    # Agreement

    def require_same(self, values: dict[str, str], what: str) -> None:
        """See the module's function ``require_same``."""
        first, *others = self.gather(values, what)
        for index, other in enumerate(others, 1):
            told = hub.differences(first, other, index)
            if told:
                raise UserError(
                    f"process {index} of {self.place.count} has another {what} than process 0: {told}; "
                    "give all processes the same files"
                )

    def gather(self, values: dict[str, str], what: str) -> list[dict[str, str]]:
        """Returns the values of all processes, by their numbers, once all have called this with the same ``what``."""
        self._send("same", name=what, value=values)
        self._wait(lambda: what in self._values or bool(self.failures))
        if what not in self._values:
            raise PartnerEnded(next(iter(self.failures.values())), self.place.count)
        return self._values.pop(what)

    def ask_to_stop(self, number: int) -> None:
        """Asks all processes of the run to stop because of this signal; called by the signal handler."""
        self._stop_asked = number

    def stopping(self, step: int = 0) -> bool:
        """Returns whether the run should stop here; all processes get True at the same call, counted from the first."""
        with self._stepping:
            self._steps += 1
            return self._stop_at is not None and self._steps >= self._stop_at

    # The end

    def leave(self, line: str, code: int, error: BaseException | None = None) -> None:
        """Tells the other processes that this one ends; returns if this process can exit in the usual way.

        Args:
          line: the last line to print; "" if the work is done.
          code: the exit code.
          error: the error that ends this process; None if the work is done.
        """
        self._begin_to_leave()
        stopped = isinstance(error, KeyboardInterrupt)
        if error is None or (stopped and self._stop_at is not None):
            self._leave_together(line, code)
            return
        if isinstance(getattr(error, "__cause__", None), RuntimeError) and self.together and self._partner_failed():
            line, code = self._partner_line()  # the real cause is the lost connection, not a file
        self._end(line, code, stopped)

    def end_at_once(self) -> None:
        """Prepares an immediate end, because of a second signal."""
        native_output.farewell()

    def leave_at_exit(self) -> None:
        """Calls the end of ``leave`` for a program that exits without it, because its work is done."""
        if self._leaving.acquire(blocking=False):
            self._leave_together("", 0)

    def fail(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Ends this process because of an unexpected error, or one that another process has caused."""
        self._begin_to_leave()
        if isinstance(error, KeyboardInterrupt):
            self._end("error: interrupted; run the same command again to continue", 130)
        native_output.note_traceback(error)
        if self.together and self._partner_failed():
            self._end(*self._partner_line())
        words = str(error).strip().splitlines()
        self._end(f"error: process {self.place.index} of {self.place.count} failed with {kind.__name__}: "
                  f"{words[0] if words else 'no message'}", 1)  # fmt: skip

    def _begin_to_leave(self) -> None:
        if not self._leaving.acquire(timeout=GRACE + LAST_STEPS):  # else another thread ends this process now
            os._exit(2)

    def _partner_failed(self) -> bool:
        """Returns whether another process has failed; waits a little, because the message may follow the error."""
        return self._wait(lambda: bool(self.failures), GRACE)

    def _partner_line(self) -> tuple[str, int]:
        ended = PartnerEnded(next(iter(self.failures.values())), self.place.count)
        return ended.line, ended.code

    def _end_for_partner(self) -> None:
        """Ends this process from another thread, because its main thread may hang in compiled code."""
        if self._leaving.acquire(blocking=False):
            self._end(*self._partner_line())

    def _end(self, line: str, code: int, stopped: bool = False) -> NoReturn:
        """Informs the others and exits at once, because jax's shutdown would wait for processes that may be dead."""
        with contextlib.suppress(OSError):
            self._send("ended", line=line, code=code, stopped=stopped)
            self._wait(lambda: self._noted, 2)
            if stopped and not self.together:  # a launcher may kill the others when the first one exits
                self._wait(lambda: self._over is not None, STOP_SECONDS)
        self._exit(line + native_output.account(), code, keep=True)

    def _leave_together(self, line: str, code: int) -> None:
        """Waits until all processes are done; process 0 holds the result, so it ignores how the others end."""
        leads = self.place.index == 0

        def over() -> bool:
            failed = not leads and bool(self.failures) if self.together else 0 in self.failures
            return self._over is not None or failed

        with contextlib.suppress(OSError, KeyboardInterrupt):
            self._send("done")
            self._wait(over, self.patience if leads else None)
        if self._over is None and not leads:
            failure = self.failures.get(0) or next(iter(self.failures.values()), None)
            if failure is None:  # the user interrupted the wait
                self._end("error: interrupted; run the same command again to continue", 130)
            ended = PartnerEnded(failure, self.place.count)
            self._end(ended.line, ended.code, failure.get("stopped", False))
        if not self._over:
            self._exit(line, code)
        say(line)
        last = threading.Timer(LAST_STEPS, os._exit, [code])
        last.daemon = True
        last.start()

    def _exit(self, line: str, code: int, keep: bool = False) -> NoReturn:
        say(line)
        native_output.farewell(keep)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


_run: Run | None = None
