"""Several processes that do one command together: how they begin, and how each of them ends.

They meet at the coordinator's address, in ``hub.py``, before jax is started: who is missing, comes twice or has another
config is said in one line. Each keeps its connection there, so that one that dies or fails ends all others at once,
with a line that names it. What jax and its libraries write, C++ stacks among it, goes to a file (``native_output``).
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

PATIENCE = 40  # seconds after which a process that is not heard of counts as dead, and all others end
WAIT = 60.0  # seconds in which all processes must have come
GRACE = 3.0  # seconds that the work gets to end by itself, with its own error, once another process has failed
LAST_STEPS = 5.0  # seconds that the interpreter gets to end after a run that is whole
AGAIN = "start all processes again with the same command to continue"


class PartnerEnded(UserError):
    """Another process of the run has ended before its work was done."""

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
    """Joins the processes of a multi-host run; does nothing in a run of one process.

    Called before anything else touches jax. A run has several processes where JAX_COORDINATOR_ADDRESS
    is set (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), or where SLURM, Open MPI or a TPU pod says so.
    When one of them dies or fails, the others end too, and their last line says why.

    Args:
      patience: seconds without a sign of life after which a process counts as dead.
      wait: seconds in which all processes must have come.
      settings: what must be equal in all processes, JSON values by name.
      together: the work of each needs all others all the time. If not, it goes on while others fail, and looks after
        itself (``require_partner``).

    Raises:
      UserError: somebody has not come, has come twice, has another setting, or the environment contradicts itself.
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
    """Returns once every process of the run has called this with the same values.

    Args:
      values: by the name that an error calls them.
      what: names the call; every process makes the same calls.

    Raises:
      UserError: the values differ. PartnerEnded: another process has ended.
    """
    if _run is not None:
        _run.require_same(dict(values), what)


def require_partner(index: int) -> None:
    """Raises PartnerEnded where process ``index`` of the run has ended before its work was done."""
    if _run is not None and index in _run.failures:
        raise PartnerEnded(_run.failures[index], _run.place.count)


class Run:
    """The run of several processes that this one belongs to. ``listen`` has a thread of its own."""

    def __init__(self, place: Place, channel: Any, patience: float, together: bool):
        self.place, self.patience, self.together = place, patience, together
        self.failures: dict[int, dict[str, Any]] = {}  # by process, in the order in which they came
        self._stop_asked: int | None = None
        self._channel, self._sending = channel, threading.Lock()
        self._steps, self._stop_at, self._stepping = 0, None, threading.Lock()
        self._news = threading.Condition()
        self._values: dict[str, list[dict[str, str]]] = {}
        self._noted, self._over = False, None  # our end is known; the run is over, and whether all came to its end
        self._leaving = threading.Lock()  # held by the thread that ends this process

    # What the hub says

    def listen(self, messages: list[dict[str, Any]]) -> None:
        """Follows the hub until it is gone, beginning with these messages."""
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
                self._stepping.acquire()  # no further step until all have said where they are
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
        """See the function of this name."""
        self._send("same", name=what, value=values)
        self._wait(lambda: what in self._values or bool(self.failures))
        if what not in self._values:
            raise PartnerEnded(next(iter(self.failures.values())), self.place.count)
        first, *others = self._values.pop(what)
        for index, other in enumerate(others, 1):
            told = hub.differences(first, other, index)
            if told:
                raise UserError(
                    f"process {index} of {self.place.count} has another {what} than process 0: {told}; "
                    "give all processes the same files"
                )

    def ask_to_stop(self, number: int) -> None:
        """Asks all processes of the run to stop because of this signal; its handler calls this."""
        self._stop_asked = number

    def stopping(self, step: int = 0) -> bool:
        """Is the run to stop here? Processes that call this equally often get True at the same call."""
        with self._stepping:
            self._steps += 1
            return self._stop_at is not None and self._steps >= self._stop_at

    # The end

    def leave(self, line: str, code: int, error: BaseException | None = None) -> None:
        """Takes leave of the other processes; returns where this one may end as one that runs alone does.

        Args:
          line: the last one; "" of a process whose work is done.
          code: to exit with.
          error: because of which it ends.
        """
        self._begin_to_leave()
        stopped = isinstance(error, KeyboardInterrupt)
        if error is None or (stopped and self._stop_at is not None):
            say(line)
            self._leave_together(code)
            return
        if isinstance(getattr(error, "__cause__", None), RuntimeError) and self.together and self._partner_failed():
            line, code = self._partner_line()  # an error about files that is one of the connection
        self._end(line, code, stopped)

    def end_at_once(self) -> None:
        """Tells that this process ends without a wait, because of a second signal."""
        native_output.farewell()

    def leave_at_exit(self) -> None:
        """``leave`` for a program that exits without it: its work is done."""
        if self._leaving.acquire(blocking=False):
            self._leave_together(0)

    def fail(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Ends this process because of an error that nobody expects, or that another process has caused."""
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
        """Has another process failed? Asked where that would explain an error; the news may come after the error."""
        return self._wait(lambda: bool(self.failures), GRACE)

    def _partner_line(self) -> tuple[str, int]:
        ended = PartnerEnded(next(iter(self.failures.values())), self.place.count)
        return ended.line, ended.code

    def _end_for_partner(self) -> None:
        """Ends this process from another thread, because its work may hang in compiled code for ever."""
        if self._leaving.acquire(blocking=False):
            self._end(*self._partner_line())

    def _end(self, line: str, code: int, stopped: bool = False) -> NoReturn:
        """Tells the others, and ends where it stands: jax's own end would wait for processes that may be dead."""
        with contextlib.suppress(OSError):
            self._send("ended", line=line, code=code, stopped=stopped)
            self._wait(lambda: self._noted, 2)
        self._exit(line + native_output.account(), code, keep=True)

    def _leave_together(self, code: int) -> None:
        """Waits until all are done. The first process, whose work is the result, does not depend on how others end."""
        leads = self.place.index == 0

        def over() -> bool:
            failed = not leads and bool(self.failures) if self.together else 0 in self.failures
            return self._over is not None or failed

        with contextlib.suppress(OSError, KeyboardInterrupt):
            self._send("done")
            self._wait(over, self.patience if leads else None)
        if self._over is None and not leads:
            failure = self.failures.get(0) or next(iter(self.failures.values()), None)
            if failure is None:  # an impatient user
                self._end("error: interrupted; run the same command again to continue", 130)
            ended = PartnerEnded(failure, self.place.count)
            self._end(ended.line, ended.code, failure.get("stopped", False))
        if not self._over:
            self._exit("", code)
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
