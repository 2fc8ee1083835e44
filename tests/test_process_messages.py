"""Several processes that cannot begin, or of which one fails, dies or is told to stop: one line each, the right one.

Run as a script, this file is one of those processes.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax.experimental import multihost_utils
from tqdm import tqdm

from arrag_jax import hub, signals
from arrag_jax.errors import UserError, run_command, start_command
from arrag_jax.processes import require_same, start_distributed
from helpers import children

ROOT = Path(__file__).resolve().parents[1]
DIED = "error: this process ended before its work was done, because "
AGAIN = "; start all processes again with the same command to continue"


class Ended:
    """How a process ended: its exit code, the lines of its stderr, stdout and the seconds that it took."""

    def __init__(self, process: subprocess.Popen, since: float):
        self.out, error = process.communicate(timeout=90)
        self.seconds = time.monotonic() - since
        self.code, self.lines = process.returncode, error.splitlines()

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


def start(environments: list[dict[str, str]], *command: str, cwds: list[Path] | None = None) -> list[subprocess.Popen]:
    """One process of ``python COMMAND`` an environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *command], env=env, cwd=cwd, **pipes)
        for env, cwd in zip(environments, cwds or [ROOT] * len(environments), strict=True)
    ]


def ends(processes: list[subprocess.Popen]) -> list[Ended]:
    """How they end; none outlives this."""
    since = time.monotonic()
    try:
        return [Ended(process, since) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(count: int, *mode: str) -> list[Ended]:
    """So many processes of this file."""
    return ends(start(children.together(count), __file__, *mode))


def numbered(environment: dict[str, str], index: int) -> dict[str, str]:
    return environment | {"JAX_PROCESS_ID": str(index)}


@pytest.mark.slow
def test_who_does_not_come_is_named_and_waited_for_no_longer_than_asked():
    """Partners that are missing, at another port, or at one where another program answers."""
    first, other = children.together(3)[0], numbered(children.together(3)[0], 1)
    with socket.create_server(("localhost", 0)) as foreign:
        occupied = first | {"JAX_COORDINATOR_ADDRESS": f"localhost:{foreign.getsockname()[1]}"}
        *alone, taken, answered = ends(
            start([first, other, occupied, numbered(occupied, 1)], __file__, "begin", "--wait=11")
        )
    missing = "processes 1, 2", "process 0"
    for end, environment, names in zip(alone, (first, other), missing, strict=True):
        address = environment["JAX_COORDINATOR_ADDRESS"]
        assert end.code == 2
        assert end.lines[0] == f"waiting for {names} of 3 at {address} (10 of 11 s)"
        assert end.last.startswith(f"error: {names} of 3 did not come to {address} within 11 s; start all")
        assert len(end.lines) == 2
    address = occupied["JAX_COORDINATOR_ADDRESS"]
    assert taken.lines == [
        f"error: process 0 cannot listen at {address}: {os.strerror(98)}; choose another port"
    ] and taken.code == 2  # fmt: skip
    assert answered.code == 2
    assert answered.last.startswith("error: process 0 of 3 did not answer (another program does, ")


@pytest.mark.slow
def test_numbers_that_contradict_one_another_are_refused_at_once():
    """Twice the same index, twice the first, and two numbers of processes: all say it, before the limit."""
    twice, firsts, counts = (children.together(count) for count in (3, 2, 2))
    groups = [
        [*twice[:2], twice[1]],
        [firsts[0]] * 2,
        [counts[0], *(numbered(counts[0], index) | {"JAX_NUM_PROCESSES": "3"} for index in (1, 2))],
    ]
    words = (
        "have the number 1 of 3; give each its own",
        "have the number 0 of 2",
        "was started for 3 processes, process 0 for 2",
    )
    processes = [start(group, __file__, "begin", "--wait=60") for group in groups]
    for group, word in zip(processes, words, strict=True):
        for end in ends(group):
            assert end.code == 2 and end.seconds < 45
            assert len(end.lines) == 1 and word in end.last, end.lines


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_PROCESS_ID": "2"},
        {"JAX_PROCESS_ID": "-1"},
        {"JAX_COORDINATOR_ADDRESS": "localhost"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:port"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:123456"},
    ],
)
def test_an_environment_that_cannot_be_is_refused(monkeypatch, environment):
    for name, value in (children.together(2)[0] | environment).items():
        if name.startswith("JAX_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(next(iter(environment)))):
        start_distributed()


def test_differences_name_few_keys_and_both_values():
    first, other = {"a": 1, "b": "x", "c": None, "d": 4, "same": 0}, {"a": 2, "b": "x" * 200, "d": 5, "same": 0}
    told = hub.differences(first, other, 3)
    assert told.startswith("a (1 in process 0, 2 in process 3), b ('x' in process 0, 'xxx")
    assert "c (None in process 0, absent in process 3), …" in told and "same" not in told and len(told) < 250


@pytest.mark.slow
def test_the_error_of_one_is_the_last_line_of_all():
    """Below the progress bar, without a word of those who did not fail about themselves."""
    told, failed = run(2, "fail")
    assert (told.code, failed.code) == (2, 2)
    assert failed.last == "error: the store is of another tokenizer; choose another"
    assert not any(line.startswith(DIED) for line in failed.lines)
    assert told.lines == [f"{DIED}process 1 of 2 ended with: the store is of another tokenizer; choose another{AGAIN}"]


@pytest.mark.slow
def test_an_error_that_nobody_expects_keeps_its_traceback_in_the_file_that_it_names():
    told, failed = run(2, "break")
    assert failed.code == 1 and len(failed.lines) == 1
    line, _, path = failed.last.partition("; details in ")
    assert line == "error: process 1 of 2 failed with ZeroDivisionError: division by zero"
    assert "Traceback" in Path(path).read_text() and "print(1 / 0)" in Path(path).read_text()
    assert told.code == 1 and told.last.startswith(f"{DIED}process 1 of 2 ended with: process 1 of 2 failed with Zero")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_dies_in_a_collective_the_other_ends_at_once_with_one_line(killed):
    """What jax says of it stands in the file that the line names."""
    processes = start(children.together(2), __file__, "collect")
    for process in processes:
        assert "at work\n" in iter(process.stdout.readline, "")
    processes[killed].kill()
    both = ends(processes)
    end, dead = both[1 - killed], both[killed]
    assert end.code == 2 and len(end.lines) == 1 and end.seconds < 20
    line, _, path = end.last.partition("; details in ")
    assert line == f"{DIED}process {killed} of 2 died{AGAIN}"
    assert not path or Path(path).stat().st_size
    assert dead.code == -signal.SIGKILL and dead.last.startswith(f"{DIED}it was killed or it crashed")


@pytest.mark.slow
def test_complete_is_the_last_word_though_a_partner_died():
    """Of a process whose work needs no other, and of one that is done before the other dies."""
    for mode in ("apart", "together"):
        end, dead = run(2, "finish", mode)
        assert end.code == 0 and end.seconds < 30
        assert end.out.splitlines()[-1] == "complete" and not end.lines, mode
        assert dead.code == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_one_stops_all_at_one_step(number, code):
    processes = start(children.together(2), __file__, "collect")
    for process in processes:
        assert "at work\n" in iter(process.stdout.readline, "")
    processes[1].send_signal(number)
    both = ends(processes)
    assert [end.code for end in both] == [code, code], [end.lines for end in both]
    words = "error: interrupted; " if code else "stopped; "
    assert all(end.last == f"{words}run the same command again to continue" for end in both)
    assert both[0].out.splitlines()[-1] == both[1].out.splitlines()[-1]  # the number of steps
    assert all(end.seconds < 20 for end in both)


STOPPED = "stopped; run the same command again to continue"


@pytest.mark.slow
def test_a_signal_outside_of_steps_stops_all():
    processes = start(children.together(2), __file__, "sleep")
    for process in processes:
        assert "at work\n" in iter(process.stdout.readline, "")
    processes[0].send_signal(signal.SIGTERM)
    for end in ends(processes):
        slow = "stopping; once more stops at once"  # said by a process that has not stopped within a second
        assert (end.code, [line for line in end.lines if line != slow]) == (0, [STOPPED])
        assert end.seconds < 20


@pytest.mark.slow
def test_another_config_is_named_by_key_and_process(tmp_path):
    """By the command, before any work: nothing is made."""
    command = ["-m", "arrag_jax.train", f"--config={ROOT / 'configs/emoji_prior.py'}", "--workdir=run", "--wait=60"]
    first, other = children.together(2)
    processes = start([first], *command, cwds=[tmp_path])
    processes += start([other], *command, "--config.steps=7", "--config.optimizer.b1=0.5", cwds=[tmp_path])
    for end in ends(processes):
        assert end.code == 2 and len(end.lines) == 1
        assert (
            "process 1 of 2 has other settings than process 0: config.optimizer.b1 (0.9 in process 0, 0.5 in"
            in end.last
        )
        assert re.search(r"config\.steps \(\d+ in process 0, 7 in process 1\); give all the same command", end.last)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_files_behind_the_same_config_are_named():
    for end in run(2, "differ"):
        assert end.code == 2
        assert end.lines == [
            "error: process 1 of 2 has another model than process 0: weights ('0' in process 0, '1' in process 1); "
            "give all processes the same files"
        ]


def main(argv: list[str]) -> None:
    """One of the processes."""
    _, mode, *rest = argv
    index, wait = int(os.environ["JAX_PROCESS_ID"]), 60.0
    if rest and rest[0].startswith("--wait="):
        wait = float(rest[0].removeprefix("--wait="))
    together = "apart" not in rest
    start_distributed(wait=wait, together=together)
    if mode == "differ":
        require_same({"tokenizer": "same"}, "model")
        require_same({"weights": str(index)}, "model")
    if index == 1 and mode == "break":
        print(1 / 0)
    if index == 1 and mode == "fail":
        bar = tqdm(total=5)
        bar.update()
        raise UserError("the store is of another tokenizer; choose another")
    if index == 1 and mode == "finish":
        time.sleep(0 if not together else 1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "finish":
        time.sleep(1.5 if not together else 0)
        print("complete", flush=True)
    if mode == "collect":
        work_in_step()
    if mode == "sleep":
        print("at work", flush=True)
    if mode in ("sleep", "break", "fail"):
        time.sleep(60)


def work_in_step() -> None:
    """Collectives until a signal comes."""
    steps = 0
    with signals.held("step") as point:
        while True:
            multihost_utils.process_allgather(steps)
            steps += 1
            print("at work" if steps == 1 else steps, flush=True)
            point.check(steps)


if __name__ == "__main__":
    start_command()  # as a command does: a signal that comes just before a system call is sent again
    run_command(main, sys.argv)
