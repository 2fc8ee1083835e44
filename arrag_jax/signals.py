"""How every command ends when it is told to: SIGINT (Ctrl-C) and SIGTERM.

The first signal stops the program at a safe point. Inside ``held`` that is the next ``check`` (a batch, a shard or a
step is finished and kept); elsewhere ``Stop`` is raised in the main thread at once. ``errors.run_command`` turns it
into one closing line and an exit code: 130 after SIGINT, 0 after SIGTERM, because batch systems start a job again that
ends so. A second signal ends the program where it stands.

A command ends by ``os._exit`` then, because an interpreter that is taken down while a compiled program still calls it
ends in a segmentation fault. Files are safe all the same: they appear whole or not at all.

This module imports the standard library alone: a command loads it before anything that takes long.
"""

import contextlib
import ctypes
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
TWICE = 0.25  # seconds in which a second signal is the first one over again: ``timeout`` and other wrappers send two
REMIND = 2.0  # seconds after which a stop is raised again, because a library may have swallowed it


class Stop(KeyboardInterrupt):
    """Raised in the main thread when the program is to end; ``number`` is the signal's."""

    def __init__(self, number: int | None = None):
        global _raised
        super().__init__()
        self.number = number or _received or signal.SIGTERM
        _raised = time.monotonic()


# The process' state; a process has one set of signal handlers, so it has one of these.
_command = False  # this process is one of the package's commands, and may be ended by this module
_starting = False  # the command is still being imported
_listening = False  # the handlers are ours
_holding: list["held"] = []  # open ``held`` blocks
_received: int | None = None  # the first signal
_since = 0.0  # when it came
_raised = 0.0  # when a stop was raised last
_unsaid = [True]  # emptied by whoever says what the first signal does
_leaving = False  # the program is on its way out
_ending = threading.RLock()  # held by the thread that ends the process
_result: int | None = None  # exit code of a command that is done, while the interpreter is taken down
_tell: Callable[[int], None] | None = None  # hands a signal on to the other processes of the run
_stderr = 2
_agree: Callable[[int], bool] | None = None  # asks all processes of the run whether they stop at this step
_again = AGAIN
_last_words: list[Callable[[], Any]] = []


def start_command() -> None:
    """Takes the signals of this process, which is one of the package's commands, before its imports.

    Also where they are ignored, as a shell has it for jobs in its background: who sends one means it.
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
    """Says that imports are over: from here on a signal stops the work. Also between two commands of one process."""
    global _starting, _again, _result
    _again, _result = AGAIN, None
    if _command:
        _take()  # some library may have taken them meanwhile
    _starting = False


def begins_anew() -> None:
    """Says that this command keeps nothing of an unfinished run: the closing line tells so."""
    global _again
    _again = FROM_THE_START


def finished(code: int) -> None:
    """Says that the command is done: a signal now only hastens its end."""
    global _result
    _result = code


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Takes SIGINT and SIGTERM while open, where this is the main thread and they are not taken yet."""
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    _forget()
    _take()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _forget()


class held:
    """While open, the first signal waits for ``check``; it says so on stderr.

    On leaving the outermost block without an error, ``Stop`` is raised where a signal has come meanwhile.
    """

    def __init__(self, what: str, seconds: float = math.inf):
        """
        Args:
          what: a signal lets be finished: "step", "batch", …
          seconds: a signal waits at most so long.
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
        """Is the program to end here? Every process of a run gets the same answer.

        Args:
          step: counts the calls; several processes agree on one step.
        """
        return _agree(step) if _agree else _received is not None

    def check(self, step: int = 0) -> None:
        """Raises ``Stop`` where the program is to end here; as ``requested``."""
        if self.requested(step):
            raise Stop


def received() -> int | None:
    """The signal that has come; None = none."""
    return _received


def check() -> None:
    """Raises ``Stop`` where a signal has come to this process."""
    if _received is not None:
        raise Stop


def together(agree: Callable[[int], bool] | None, tell: Callable[[int], None]) -> None:
    """Sets how the processes of one run stop together.

    Args:
      agree: from the number of a step to whether it is the last; the same answer in every process. None = each sees
        to itself.
      tell: hands a signal that has come to this process on to the others.
    """
    global _agree, _tell
    _agree, _tell = agree, tell


def hand_over(number: int) -> None:
    """Lets this process act as if the signal had come here as well; to be called in any thread."""
    if _listening and _received is None and not _leaving and _result is None:
        os.kill(os.getpid(), number)


def write_to(file: int) -> None:
    """Sets the file descriptor that is stderr; 2 is what libraries write to in a run of several processes."""
    global _stderr
    _stderr = file


def settle() -> None:
    """Says that this process is on its way out already: only a second signal still changes that."""
    global _leaving
    _leaving = True


def before_the_end(say: Callable[[], Any]) -> None:
    """Has ``say`` called before this process ends by a signal."""
    _last_words.append(say)


def cause(error: BaseException) -> int | None:
    """The signal because of which this error ends the program; None = it has another cause."""
    if isinstance(error, Stop):
        return error.number
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    # what a signal leaves behind in a library: an error of XLA's, where a host call was interrupted
    return _received if isinstance(error, Exception) else None


def leave(number: int) -> NoReturn:
    """Ends the program because of a signal: the closing line, and exit code 130 (SIGINT) or 0 (SIGTERM)."""
    settle()
    code = code_of(number)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if not _command:
        print(closing_line(number), file=sys.stderr)
        sys.exit(code)
    _end(number, code)


def code_of(number: int) -> int:
    """The exit code of a command that ends because of this signal."""
    return 130 if number == signal.SIGINT else 0


def closing_line(number: int) -> str:
    """The last line of a command that ends because of this signal."""
    return f"error: interrupted; {_again}" if number == signal.SIGINT else f"stopped; {_again}"


def _end(number: int, code: int) -> NoReturn:
    """Ends this process where it stands; to be called in any thread."""
    _ending.acquire()  # for ever: handler and watcher may both come here, and one of them says it
    _say_last_words()
    _write(closing_line(number))
    os._exit(code)


def _say_last_words() -> None:
    for say in _last_words:
        with contextlib.suppress(Exception):
            say()


def _write(line: str) -> None:
    """One line on stderr, past Python's buffers: printing may be what was interrupted."""
    with contextlib.suppress(OSError):
        bar = b"\n" if os.isatty(_stderr) else b""  # a progress bar may stand in the line
        os.write(_stderr, bar + line.encode() + b"\n")


def _take() -> None:
    global _listening
    _listening = True
    for number in NUMBERS:
        signal.signal(number, _handle)


def _release() -> None:
    """A forked child is no command; it ends as Python does."""
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
    """Runs in the main thread, between two instructions of Python."""
    global _received, _since
    if _result is not None:
        _say_last_words()
        os._exit(_result)
    if _starting:  # raised in here, an exception would be swallowed by one of the libraries that are being loaded
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
    """Sees to signals while the main thread is inside compiled code, where no handler of Python's runs.

    Says what the first one does, ends the process at the second, and raises the stop again that was swallowed.
    """
    first = os.read(reading, 1)
    while first[0] not in NUMBERS:
        first = os.read(reading, 1)
    came = time.monotonic()
    threading.Thread(target=_remind, args=(came,), daemon=True).start()
    while True:
        number = os.read(reading, 1)[0]
        if number in NUMBERS and time.monotonic() - came > TWICE and not _starting and _result is None:
            _end(number, 128 + number)


def _remind(came: float) -> None:
    main = ctypes.c_ulong(threading.main_thread().ident)
    while True:
        time.sleep(0.2 if _holding else REMIND / 2)
        if _leaving or _starting or (_agree and _holding) or _result is not None:
            continue
        _say_what_happens()
        since, limit = (came, _holding[-1].seconds) if _holding else (max(came, _raised), REMIND)
        if time.monotonic() - since > limit:
            came = time.monotonic()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Stop))


def _unraisable(problem: Any) -> None:
    """Of an exception that Python drops, because it was raised in a destructor or a callback: a stop still stops."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        if not _leaving:
            leave(_received or signal.SIGINT)
        return
    sys.__unraisablehook__(problem)
