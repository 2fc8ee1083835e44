# size: a process has one set of signal handlers; their state is not divided among modules
"""Handles SIGINT (Ctrl-C) and SIGTERM, so that every command stops at a safe point.

Inside a ``held`` block the first signal takes effect at the next ``check``, when a batch, a shard or a step is finished
and saved. Elsewhere ``Stop`` is raised in the main thread at once. ``errors.run_command`` then prints one closing line
and exits with 130 after SIGINT, or 0 after SIGTERM, because batch systems restart a job that ends with 0. A second one
ends the program.

A stopped command ends by ``os._exit``, because an interpreter that shuts down while a compiled program still calls it
causes a segmentation fault. Files stay valid, because they are written atomically. This module imports only the
standard library, because a command loads it before all slow imports.
"""

import contextlib
import ctypes
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "run the same command again to continue"
FROM_THE_START = "run the same command again; it begins anew"
TWICE = 0.25  # a signal within so many seconds repeats the first one: ``timeout`` and other wrappers send two
REMIND = 2.0  # seconds after which a stop is raised again, because a library may have swallowed it


class Stop(KeyboardInterrupt):
    """Raised in the main thread to end the program; ``number`` is the signal's number."""

    def __init__(self, number: int | None = None):
        global _raised
        super().__init__()
        self.number = number or _received or signal.SIGTERM
        _raised = time.monotonic()


# The state is global, because a process has only one set of signal handlers.
_command = False  # this process runs one of the package's commands, so this module may end it
_starting = False  # the command is still importing modules
_listening = False  # our signal handlers are installed
_holding: list["held"] = []  # open ``held`` blocks
_received: int | None = None  # the first signal
_since = 0.0  # time of the first signal
_handled = 0.0  # time when the handler last ran
_raised = 0.0  # time when ``Stop`` was last raised
_unsaid = [True]  # emptied when the effect of the first signal is printed
_repeats: list[int] = []  # signals that ``_repeat`` has sent and ``_watch`` has not seen yet
_leaving = False  # the program is exiting
_ending = threading.RLock()  # held for ever by the thread that ends the process
_result: int | None = None  # exit code of a finished command, while the interpreter shuts down
_tell: Callable[[int], None] | None = None  # forwards a signal to the other processes of the run
_stderr = 2
_agree: Callable[[int], bool] | None = None  # agrees with all processes of the run whether this step is the last
_again = AGAIN
_last_words: list[Callable[[], Any]] = []


def start_command() -> None:
    """Installs the signal handlers of a process that runs one of the package's commands, before its slow imports.

    Handlers are installed even if the signals were ignored, as in background jobs of a shell.
    """
    global _command, _starting
    _command = _starting = True
    _take()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    sys.unraisablehook = _unraisable
    os.register_at_fork(after_in_child=_release)


def begin() -> None:
    """Marks the end of imports, after which a signal stops the work; called for each command of a process."""
    global _starting, _again, _result
    _again, _result = AGAIN, None
    if _command:
        _take()  # a library may have replaced the handlers
    _starting = False


def begins_anew() -> None:
    """Makes the closing line say that this command keeps nothing of an unfinished run."""
    global _again
    _again = FROM_THE_START


def finished(code: int) -> None:
    """Records that the command is finished; from now on a signal exits at once with ``code``."""
    global _result
    _result = code


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handles SIGINT and SIGTERM while open; only in the main thread, and only if they are not handled yet."""
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    _forget()
    _take()
    try:
        yield
    finally:
        _forget()
        for number, handler in before.items():
            signal.signal(number, handler)


class held:
    """A context in which the first signal waits for ``check``; a line on stderr says so.

    When the outermost block ends without an error, it raises ``Stop`` if a signal has arrived.
    """

    def __init__(self, what: str, seconds: float = math.inf):
        """
        Args:
          what: name of the work that is finished first, such as "step" or "batch".
          seconds: the longest time that a signal waits.
        """
        self.what, self.seconds = what, seconds
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "held":
        self._stack.enter_context(listening())
        _holding.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        _holding.remove(self)
        stop = kind is None and not _holding and _received is not None and _agree is None
        number = _received
        self._stack.close()
        if stop:
            raise Stop(number)

    def requested(self, step: int = 0) -> bool:
        """Returns whether the program should end here; all processes of a run get the same answer.

        Args:
          step: number of the call; several processes agree on one step.
        """
        return _agree(step) if _agree else _received is not None

    def check(self, step: int = 0) -> None:
        """Raises ``Stop`` if the program should end here; see ``requested``."""
        if self.requested(step):
            raise Stop


def received() -> int | None:
    """Returns the first signal that has arrived; None = none."""
    return _received


def check() -> None:
    """Raises ``Stop`` if a signal has arrived in this process."""
    if _received is not None:
        raise Stop


def together(agree: Callable[[int], bool] | None, tell: Callable[[int], None]) -> None:
    """Sets how the processes of one run stop together.

    Args:
      agree: from the number of a step to whether it is the last; it returns the same in every process. None = each
        process decides alone.
      tell: forwards a signal of this process to the others.
    """
    global _agree, _tell
    _agree, _tell = agree, tell


def hand_over(number: int) -> None:
    """Sends this process a signal that another process has received; can be called in any thread."""
    if _listening and _received is None and not _leaving and _result is None:
        now = time.monotonic()
        signal.pthread_kill(_main_thread(), number)
        threading.Thread(target=_repeat, args=(number, now), daemon=True).start()


def write_to(file: int) -> None:
    """Sets the file descriptor for lines of this module; descriptor 2 may belong to ``native_output``."""
    global _stderr
    _stderr = file


def settle() -> None:
    """Records that this process is exiting; from now on only a second signal has an effect."""
    global _leaving
    _leaving = True


def before_the_end(say: Callable[[], Any]) -> None:
    """Registers ``say`` to be called before a signal ends this process."""
    _last_words.append(say)


def cause(error: BaseException) -> int | None:
    """Returns the signal that caused this error; None if no signal did."""
    if isinstance(error, Stop):
        return error.number
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    # A signal that interrupts a host call of XLA becomes an XLA error.
    return _received if isinstance(error, Exception) else None


def leave(number: int) -> NoReturn:
    """Ends the program after a signal: prints the closing line, exits with 130 (SIGINT) or 0 (SIGTERM)."""
    settle()
    code = code_of(number)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if not _command:
        print(closing_line(number), file=sys.stderr)
        sys.exit(code)
    _end(number, code)


def code_of(number: int) -> int:
    """Returns the exit code of a command that this signal ends."""
    return 130 if number == signal.SIGINT else 0


def closing_line(number: int) -> str:
    """Returns the last line of a command that this signal ends."""
    return f"error: interrupted; {_again}" if number == signal.SIGINT else f"stopped; {_again}"


def _end(number: int, code: int) -> NoReturn:
    """Ends this process immediately; can be called in any thread."""
    _ending.acquire()  # the signal handler and the watcher may both call this; only one may print the closing line
    _say_last_words()
    _write(closing_line(number))
    os._exit(code)


def _say_last_words() -> None:
    for say in _last_words:
        with contextlib.suppress(Exception):
            say()


def _write(line: str) -> None:
    """Writes one line to stderr without Python's buffers, because the signal may have interrupted a print."""
    with contextlib.suppress(OSError):
        bar = b"\n" if os.isatty(_stderr) else b""  # the current line may show a progress bar
        os.write(_stderr, bar + line.encode() + b"\n")


def _take() -> None:
    global _listening
    _listening = True
    for number in NUMBERS:
        signal.signal(number, _handle)


def _release() -> None:
    """Restores Python's own signal handling in a forked child."""
    global _command, _starting, _agree, _tell
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _command = _starting = False
    _agree = _tell = None
    _holding.clear()
    _forget()


def _forget() -> None:
    global _listening, _received, _leaving, _result
    _listening, _received, _leaving, _result = False, None, False, None
    _unsaid[:] = [True]


def _handle(number: int, _: Any) -> None:
    """Handles a signal; Python calls this in the main thread, between two instructions."""
    global _received, _since, _handled
    _handled = time.monotonic()
    if _result is not None:
        _say_last_words()
        os._exit(_result)
    if _starting:  # an exception does not help, because libraries may swallow it during their import
        _end(number, code_of(number))
    if _leaving:
        return
    first, now = _received is None, time.monotonic()
    if first:
        _received, _since = number, now
    elif now - _since > TWICE and _command:
        _end(number, 128 + number)
    if not first and now - _since <= TWICE:
        return
    if first and _tell:
        _tell(number)
    if first and _holding:
        _say_what_happens()
        return
    raise Stop(number)


def _say_what_happens() -> None:
    try:
        _unsaid.pop()
    except IndexError:
        return
    held = _holding[-1] if _holding else None
    limit = f", or in {held.seconds:.0f} s" if held and held.seconds < math.inf else ""
    _write(f"stopping{f' after this {held.what}{limit}' if held else ''}; once more stops at once")


def _watch(reading: int) -> None:
    """Handles signals while the main thread is inside compiled code, where no Python handler runs.

    Prints what the first signal does, ends the process at the second, and raises ``Stop`` again if it was swallowed.
    """
    numbers = filter(NUMBERS.__contains__, (os.read(reading, 1)[0] for _ in itertools.count()))
    first, came = next(numbers), time.monotonic()
    threading.Thread(target=_repeat, args=(first, came - TWICE), daemon=True).start()
    threading.Thread(target=_remind, args=(came,), daemon=True).start()
    for number in numbers:
        if _repeats:
            _repeats.pop()
        elif time.monotonic() - came > TWICE and not _starting and _result is None:
            _end(number, 128 + number)


def _main_thread() -> int:
    return threading.main_thread().ident or 0


def _repeat(number: int, since: float) -> None:
    """Sends a signal again until its handler runs: one that arrives just before a system call does not interrupt it."""
    for seconds in (0.1, 1, 1):
        time.sleep(seconds)
        if _handled > since or not _listening or _leaving or _result is not None:
            return
        if _command:
            _repeats.append(number)
        signal.pthread_kill(_main_thread(), number)


def _remind(came: float) -> None:
    while True:
        time.sleep(0.2 if _holding else REMIND / 2)
        if _leaving or _starting or (_agree and _holding) or _result is not None:
            continue
        _say_what_happens()
        since, limit = (came, _holding[-1].seconds) if _holding else (max(came, _raised), REMIND)
        if time.monotonic() - since > limit:
            came = time.monotonic()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(_main_thread()), ctypes.py_object(Stop))


def _unraisable(problem: Any) -> None:
    """Stops the program even if ``Stop`` was raised in a destructor or a callback, where Python drops exceptions."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        if not _leaving:
            leave(_received or signal.SIGINT)
        return
    sys.__unraisablehook__(problem)
