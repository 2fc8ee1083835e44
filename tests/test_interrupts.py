"""Laws of endings: a signal at any moment is one line and one exit code, and the same command ends with the same bytes.

What is interrupted is a real process; ``-X importtime`` and the files that appear tell how far it has come.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arrag_jax import signals
from arrag_jax.errors import run_command
from helpers import children, drawings
from helpers.drawings import MODEL, PROMPTS, bytes_of

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = "error: interrupted; run the same command again to continue"
STOPPED = "stopped; run the same command again to continue"
ENOUGH = 120  # seconds after which a process is taken to hang
# The shell of a background job has its children ignore SIGINT, and Python leaves it so until the package is imported.
HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Of 24 scenes, with a ScaNN index."""
    return drawings.make_store(tmp_path_factory)


def drawing(store: str, out: Path) -> list[str]:
    """The command that draws ``PROMPTS`` with ScaNN, two at a time, into ``out``."""
    config = ["configs/emoji_daid.py", f"retrieval.store={store}", "retrieval.k=16", "daid.weight=0.3", "batch_size=2"]
    words = [f"--config={config[0]}", *(f"--config.{word}" for word in config[1:]), "--method=daid"]
    return ["arrag_jax.generate", *words, *(f"--prompt={prompt}" for prompt in PROMPTS), f"--workdir={out}"]


class Running:
    """A command under way."""

    def __init__(self, words: list[str], env: dict[str, str] | None = None, flags: tuple[str, ...] = ()):
        command = [sys.executable, "-c", HEED, sys.executable, *flags, "-m", *words]
        self._child = subprocess.Popen(
            command, cwd=ROOT, env=env or children.alone(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._child.stderr), daemon=True)
        self._reader.start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, or the command has ended."""
        give_up = time.monotonic() + ENOUGH
        while not condition() and self._child.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.002)

    def says(self, words: str) -> bool:
        """Whether a line of stderr ends so."""
        return any(line.rstrip("\n").endswith(words) for line in list(self.lines))

    def send(self, number: int) -> None:
        self._child.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and stderr without the times of imports and the lines of libraries."""
        try:
            code = self._child.wait(ENOUGH)
        finally:
            self._child.kill()
        self._reader.join()
        self._child.stdout.close()
        foreign = ("import time:", "WARNING:absl", "W0", "W1", "I0", "I1")
        return code, [line.rstrip("\n") for line in self.lines if not line.startswith(foreign)]


@pytest.mark.parametrize("module", ["arrag_jax", "numpy", "jax"])
def test_an_interrupt_while_a_command_is_imported_ends_it_at_once(tmp_path, module):
    """Some libraries drop an exception that is raised while they are loaded."""
    command = Running(drawing("none", tmp_path / "out"), flags=("-X", "importtime"))
    command.wait_for(lambda: command.says(f" {module}"))
    command.send(signal.SIGINT)
    assert command.end() == (130, [INTERRUPTED])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_drawing_that_is_interrupted_again_and_again_ends_with_the_same_bytes(store, tmp_path):
    """In compilation, in the first batch and between batches; no picture is drawn twice, and none is lost."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert Running(drawing(store, whole)).end() == (0, [])
    pictures = lambda: {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.png")}  # noqa: E731
    seen: dict[str, int] = {}
    for number, closing, begun in (
        (signal.SIGINT, INTERRUPTED, lambda: (parts / "run.json").exists()),
        (signal.SIGTERM, STOPPED, lambda: len(pictures()) > 2),
    ):
        command = Running(drawing(store, parts))
        command.wait_for(begun)
        command.send(number)
        code, lines = command.end()
        assert (code, lines[-1]) == (130 if number == signal.SIGINT else 0, closing), lines
        said = [line for line in lines[:-1] if not line.startswith("continuing: ")]
        assert said in ([], ["stopping after this batch; once more stops at once"])
        assert seen.items() <= pictures().items() and len(pictures()) % 2 == 0
        seen = pictures()
    assert len(seen) >= 2  # the first batch was kept
    code, lines = Running(drawing(store, parts)).end()
    assert code == 0 and all(line.startswith("continuing: ") for line in lines), lines  # no bar where no terminal is
    assert seen.items() <= pictures().items()
    assert bytes_of(parts) == bytes_of(whole)


@pytest.mark.slow
def test_a_second_interrupt_ends_a_compilation_at_once(store, tmp_path):
    slowly = {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}  # 16 times as long as the two signals are apart
    command = Running(drawing(store, tmp_path), children.alone() | slowly | {"JAX_LOG_COMPILES": "1"})
    command.wait_for(lambda: any("Compiling jit(_advance)" in line for line in list(command.lines)))
    command.send(signal.SIGINT)
    command.wait_for(lambda: command.says("once more stops at once"))
    time.sleep(signals.TWICE + 0.02)
    command.send(signal.SIGINT)
    code, printed = command.end()  # before the last line it also says what it compiles
    assert (code, printed[-1]) == (130, INTERRUPTED)
    assert printed.count("stopping after this batch; once more stops at once") == 1
    assert not list(tmp_path.glob("[0-9]*.png"))


MISSED = """
import signal, threading, time
from arrag_jax.errors import run_command, start_command

def send():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

start_command()
threading.Thread(target=send).start()
run_command(lambda _: time.sleep(60), [])
"""


def test_a_signal_that_does_not_wake_the_main_thread_ends_its_sleep():
    """As one does that another thread gets, or that comes just before the main thread begins to sleep."""
    since = time.monotonic()
    command = [sys.executable, "-c", MISSED]
    ended = subprocess.run(command, cwd=ROOT, env=children.alone(), text=True, capture_output=True, timeout=90)
    assert (ended.returncode, ended.stderr) == (0, f"{STOPPED}\n")
    assert time.monotonic() - since < 30


SWALLOWED = """
import contextlib, sys, time
from arrag_jax import signals
from arrag_jax.errors import run_command

class Careless:
    def __del__(self):
        time.sleep(60)

def main(_):
    print("begun", file=sys.stderr, flush=True)
    if sys.argv[1] == "destructor":
        Careless()
    if sys.argv[1] == "shard":
        with signals.held("shard", 1):
            while True:
                time.sleep(0.05)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)

signals.start_command()
signals.REMIND = 0.1
run_command(main, [])
"""


@pytest.mark.parametrize("where", ["destructor", "library"])
@pytest.mark.parametrize(("number", "code", "line"), [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 0, STOPPED)])
def test_an_interrupt_that_a_library_swallows_still_ends_the_command(tmp_path, where, number, code, line):
    """A destructor's exception is dropped by Python itself; a loop that swallows every one needs the second signal."""
    (tmp_path / "careless.py").write_text(SWALLOWED)
    env = children.alone() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = Running(["careless", where], env)
    command.wait_for(lambda: command.says("begun"))
    command.send(number)
    if where == "library":
        command.wait_for(lambda: command.says("once more stops at once"))
        time.sleep(2 * signals.TWICE)
        command.send(number)
        code = 128 + number
    ended, lines = command.end()
    assert (ended, lines[-1]) == (code, line) and not any("Traceback" in words for words in lines), lines


def test_a_shard_that_takes_too_long_is_given_up(tmp_path):
    (tmp_path / "careless.py").write_text(SWALLOWED)
    command = Running(["careless", "shard"], children.alone() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
    command.wait_for(lambda: command.says("begun"))
    command.send(signal.SIGTERM)
    assert command.end() == (0, ["begun", "stopping after this shard, or in 1 s; once more stops at once", STOPPED])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_check_of_a_held_block_and_for_nothing_else(capfd, number):
    done = []

    def main(_) -> None:
        with signals.held("step") as point:
            for step in range(5):
                if step == 2:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), number)  # as ``timeout`` does: one signal, sent twice
                done.append(step)
                point.check()

    before = [signal.getsignal(number) for number in signals.NUMBERS]
    with pytest.raises(SystemExit) as stop:
        run_command(main, [])
    assert done == [0, 1, 2] and stop.value.code == (130 if number == signal.SIGINT else 0)
    closing = INTERRUPTED if number == signal.SIGINT else STOPPED
    assert capfd.readouterr().err.splitlines() == ["stopping after this step; once more stops at once", closing]
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before


def test_a_program_that_runs_several_commands_outlives_a_signal_to_the_second(capfd):
    """What the first one ended with is no reason to end the program."""

    def main(_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENOUGH)

    with pytest.raises(SystemExit):
        run_command(lambda _: 0, [])
    with pytest.raises(SystemExit) as stop:
        run_command(main, [])
    assert stop.value.code == 0 and STOPPED in capfd.readouterr().err


def test_an_error_that_an_interrupt_leaves_behind_is_the_interrupt(capfd):
    """XLA makes an error of its own of an exception in a host call."""

    def main(_) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            raise RuntimeError("INTERNAL: CpuCallback error") from stop

    with pytest.raises(SystemExit) as stop:
        run_command(main, [])
    assert (stop.value.code, capfd.readouterr().err) == (130, f"{INTERRUPTED}\n")


def building(data: str, store: str) -> list[str]:
    words = ["source=emoji_scenes/tiny", f"data_dir={data}", "num_images=60", "shard_size=1", "batch_size=1"]
    config = [f"--config={ROOT / 'configs' / 'emoji_datastore.py'}", f"--config.model={MODEL}", "--config.indexes="]
    return ["arrag_jax.build_datastore", *config[:2], *(f"--config.{word}" for word in words), f"--workdir={store}"]


@pytest.mark.slow
@pytest.mark.parametrize("told", [(True, True), (True, False), (False, True)], ids=["both", "first", "second"])
def test_processes_that_build_stop_together_at_sigterm(tmp_path, told):
    """Each finishes its shard, whichever of them is told; one process goes on."""
    directory = tmp_path / "store"
    words = building(str(tmp_path / "data"), str(directory))
    processes = [Running(words, env) for env in children.together(2)]
    for process in processes:
        process.wait_for(lambda: len(list(directory.glob("codes-*"))) > 3)
    for process, tell in zip(processes, told, strict=True):
        if tell:
            process.send(signal.SIGTERM)
    for process in processes:
        code, lines = process.end()
        assert (code, lines[-1]) == (0, STOPPED), lines
    assert not (directory / "manifest.json").exists() and not list(directory.glob(".*"))
    left = bytes_of(directory)
    assert 3 < sum(name.startswith("codes-") for name in left) < 60
    assert Running(words).end()[0] == 0
    assert left.items() - {("building.json", left["building.json"])} <= bytes_of(directory).items()
