"""Laws of the script for TPU slices: what it does with a queued resource, and what its workers run.

Nothing here has met Google's service: a stand-in for gcloud has the states that its pages describe.
"""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.launching import (
    COMMAND,
    POD,
    ROOT,
    STOPPABLE,
    calls,
    environment,
    launch,
    option,
    write_stub,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--project=p"], ["--project=p", "--spot"], ["--project=p", "--slices=3", "--reserved"]]
)
def test_dry_run_prints_what_a_first_launch_calls(repository, flags):
    """The readers of logs run beside the command, so that their order is not known."""
    printed = launch(repository, *POD, *flags, "--dry_run", "--", *COMMAND).stdout
    done = launch(repository, *POD, *flags, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    printed_calls = [words for words in map(shlex.split, printed.splitlines()) if words[0] == "gcloud"]
    called = calls(repository)
    if "--spot" in flags:  # then an end with code 0 is looked at again
        assert [words[3:5] for words in called[-2:]] == [["queued-resources", "describe"], ["tpu-vm", "describe"]]
        called = called[:-2]
    assert sorted(printed_calls) == sorted(called)
    assert all("--zone=us-east5-b" in words and "--project=p" in words for words in called)


def verbs(root: Path) -> list[str]:
    """What was done to the queued resource."""
    return [words[4] for words in calls(root) if words[3] == "queued-resources" and words[4] in ("create", "delete")]


@pytest.mark.slow
def test_a_request_is_made_only_when_there_is_none(repository):
    """Its slices, tier and software are those of the flags; each slice has a folder of logs per launch."""
    for number, made in ((1, ["create"]), (2, ["create"])):
        done = launch(repository, *POD, "--slices=2", "--spot", "--version=v", "--logs=logs", "--", *COMMAND)
        assert done.returncode == 0, done.stderr
        assert verbs(repository) == made
        assert sorted(str(path.relative_to(repository)) for path in (repository / "logs").rglob("*.log"))[
            2 * number - 2 :
        ] == [f"logs/{number}/pod-0/0.log", f"logs/{number}/pod-1/0.log"]
    (create,) = (words for words in calls(repository) if words[4] == "create")
    assert create[5:] == [
        *("pod", "--zone=us-east5-b", "--node-count=2", "--node-prefix=pod", "--accelerator-type=v6e-16"),
        *("--runtime-version=v", "--spot"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["255 SUSPENDED", "1 SUSPENDED", "0 SUSPENDED"])
def test_a_preempted_request_is_made_anew_and_the_command_runs_again(repository, end):
    """However the command ended when its slices were taken away: cut off, failed, or told to save."""
    (repository / "calls.ends").write_text(f"{end}\n3 ACTIVE\n")
    done = launch(repository, *POD, "--spot", "--logs=logs", "--", *COMMAND)
    assert done.returncode == 3, done.stderr
    assert verbs(repository) == ["create", "delete", "create"]
    started = [words for words in calls(repository) if "setsid" in " ".join(words)]
    assert len(started) == 2 and started[0] == started[1]
    assert sorted(path.name for path in (repository / "logs").iterdir()) == ["1", "2", "created"]


@pytest.mark.slow
def test_a_lost_connection_is_made_anew_and_the_command_is_not(repository):
    (repository / "calls.ends").write_text("255 ACTIVE\n5 ACTIVE\n")
    done = launch(repository, *POD, "--", *COMMAND)
    assert (done.returncode, verbs(repository)) == (5, ["create"])
    assert sum("setsid" in " ".join(words) for words in calls(repository)) == 1


@pytest.mark.parametrize("flags", [["--", *COMMAND], ["--delete"]])
def test_a_request_of_somebody_else_is_not_deleted(repository, flags):
    """Neither one without a record nor one that was made anew under a recorded name."""
    script = [*POD[:-2], *(["--type=v6e-16"] if "--" in flags else []), "--logs=logs", *flags]
    (repository / "calls.state").write_text("SUSPENDED")
    (repository / "calls.state.made").write_text("today")
    for record in (None, "yesterday"):
        if record:
            (repository / "logs").mkdir()
            (repository / "logs" / "created").write_text(record)
        done = launch(repository, *script)
        assert (done.returncode, verbs(repository)) == (2, [])
        assert "did not create" in done.stderr and "gcloud compute tpus queued-resources delete pod" in done.stderr
    (repository / "logs" / "created").write_text("today")
    if "--delete" in flags:
        assert launch(repository, *script).returncode == 0
        assert verbs(repository) == ["delete"]


@pytest.mark.parametrize(("state", "said"), [("FAILED", "failed"), ("gone", "gcloud does not tell")])
def test_a_request_that_cannot_be_used_is_one_line(repository, state, said):
    stub = "echo FAILED\n" if state == "FAILED" else 'echo "ERROR: no network" >&2; exit 1\n'
    write_stub(repository / "stubs" / "gcloud", stub)
    done = launch(repository, *POD, "--", *COMMAND)
    assert (done.returncode, len(calls(repository))) == (2, 1)
    assert said in done.stderr.splitlines()[-1]


@pytest.fixture
def worker(repository, tmp_path):
    """The commands that a launch sends (check, start, follow), and a stand-in worker that runs them."""
    printed = [shlex.split(line) for line in launch(repository, *POD, "--dry_run", "--", *COMMAND).stdout.splitlines()]
    remote = [(option(words, "worker"), option(words, "command")) for words in printed if "ssh" in words]
    assert [name for name, _ in remote] == ["all", "all", "all", "all", "0"]
    check, _, start, _, follow = (command for _, command in remote)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout
    home = tmp_path / "home"
    (home / "arrag_jax_run" / commit[:12]).mkdir(parents=True)
    (home / "arrag_jax_run/.venv/bin").mkdir(parents=True)
    (home / "arrag_jax_run/.venv/bin/activate").write_text("")

    def run(step: str) -> subprocess.CompletedProcess:
        words = ["sh", "-c", {"check": check, "start": start, "follow": follow}[step]]
        return subprocess.run(words, cwd=home, env=environment(repository), capture_output=True, text=True, timeout=30)

    run.home = home / "arrag_jax_run"
    return run


@pytest.mark.slow
def test_every_worker_runs_the_command_as_it_was_given(repository, worker):
    write_stub(repository / "stubs" / "python", 'echo "platforms $JAX_PLATFORMS"; exit 3\n')
    assert worker("check").returncode == 0
    assert worker("start").returncode == 0
    followed = worker("follow")
    assert calls(repository) == [COMMAND]
    assert (followed.stdout, followed.returncode) == ("platforms tpu,cpu\n", 3)
    assert worker("check").returncode == 0


@pytest.mark.slow
def test_a_busy_worker_refuses_and_one_kill_stops_its_command(repository, worker):
    write_stub(repository / "stubs" / "python", STOPPABLE)
    assert worker("start").returncode == 0
    give_up = time.monotonic() + 20
    while "started" not in (worker.home / "log").read_text() and time.monotonic() < give_up:
        time.sleep(0.02)
    group = int((worker.home / "pid").read_text())
    busy = worker("check")
    assert (busy.returncode, f"kill -TERM -- -{group}" in busy.stderr) == (1, True)
    os.killpg(group, signal.SIGTERM)
    followed = worker("follow")
    assert (followed.stdout.splitlines()[-1], followed.returncode) == ("saved", 0)


def test_the_installed_jax_is_the_pinned_one(repository):
    pin = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax=="))
    assert pin.replace("jax", "jax[tpu]") in launch(repository, *POD, "--dry_run", "--", *COMMAND).stdout
