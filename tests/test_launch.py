"""Laws of the launch scripts: a dry run runs nothing, and what it prints is what the workers get."""

import json
import re
import shlex
import signal
import socket
import subprocess

import pytest

from helpers.launching import (
    COMMAND,
    POD,
    ROOT,
    SLURM,
    STOPPABLE,
    calls,
    environment,
    launch,
    option,
    write_stub,
)


@pytest.mark.parametrize(
    "script",
    [
        [*POD, "--dry_run"],
        [*POD, "--ray", "--dry_run"],
        [*SLURM, "--dry_run"],
        [*SLURM, "--ray", "--dry_run"],
        [*POD[:-2], "--delete", "--dry_run"],
        ["launch/ray_cloud.sh", "aws", "--dry_run"],
        ["launch/ray_cloud.sh", "kubernetes", "--dry_run"],
    ],
)
def test_dry_run_calls_nothing(repository, script):
    done = launch(repository, *script, *([] if "--delete" in script else ["--", *COMMAND]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert calls(repository) == []


def test_slurm_runs_the_command_as_it_was_given(repository):
    (repository / ".venv/bin").mkdir(parents=True)
    (repository / ".venv/bin/activate").write_text("")
    write_stub(repository / "stubs" / "python", "exit 3\n")
    done = launch(repository, *SLURM, "--", *COMMAND)
    assert calls(repository)[1:] == [COMMAND]
    assert done.returncode == 3
    printed = launch(repository, *SLURM, "--dry_run", "--", *COMMAND).stdout
    assert shlex.split(printed)[2:] == calls(repository)[0]


def test_a_terminated_slurm_job_saves_and_is_queued_again(repository):
    (repository / ".venv/bin").mkdir(parents=True)
    (repository / ".venv/bin/activate").write_text("")
    write_stub(repository / "stubs" / "python", STOPPABLE)
    script = subprocess.Popen(
        ["bash", *SLURM, "--", *COMMAND], cwd=repository, env=environment(repository), stdout=subprocess.PIPE, text=True
    )
    assert script.stdout.readline() == "started\n"
    script.send_signal(signal.SIGTERM)
    assert script.communicate(timeout=30)[0] == "saved\n"
    assert script.returncode == 0
    assert calls(repository)[-1] == ["scontrol", "requeue", "7"]


# Stands in for `ray start --block`: listens where a head would, until SIGTERM. `sleep` never ends by itself.
RAY = """echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>"$CALLS.tokens"
for word in "$@"; do [[ $word == --port=* ]] && port=${word#--port=}; done
exec python3 -c 'import socket, sys, time
if len(sys.argv) > 1:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(100)' ${port:-}
"""


@pytest.mark.slow
def test_a_job_runs_its_command_once_on_the_cluster_of_its_machines(repository):
    """Each machine stops the Ray that it has started; the last one waits for the head to end."""
    (repository / ".venv/bin").mkdir(parents=True)
    (repository / ".venv/bin/activate").write_text("")
    write_stub(repository / "stubs" / "ray", RAY)
    write_stub(repository / "stubs" / "python", "exit 3\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both tasks of srun, on this machine.
    both = f"""while [[ $1 != bash ]]; do shift; done; shift 3
for rank in 0 1; do SLURM_PROCID=$rank HEAD=127.0.0.1 POLL=0.1 bash launch/ray_job.sh --port={port} "$@" & done
wait %1; code=$?; wait; exit $code
"""
    write_stub(repository / "stubs" / "srun", both)
    done = launch(repository, *SLURM, "--ray", "--", *COMMAND)
    assert done.returncode == 3, done.stderr
    started, ran = ([words for words in calls(repository) if words[0] == name] for name in ("ray", "python"))
    assert ran == [[*COMMAND, f"--ray=127.0.0.1:{port}"]]
    assert sorted(words[2] for words in started) == [f"--address=127.0.0.1:{port}", "--head"]
    (token,) = set((repository / "calls.tokens").read_text().splitlines())
    assert re.fullmatch("token [0-9a-f]{64}", token)
    with socket.socket() as port_of_head:
        port_of_head.bind(("127.0.0.1", port))  # nobody listens there any more


def test_no_machine_joins_without_a_token(repository):
    job = ["launch/ray_job.sh", "--", *COMMAND]
    words = ["env", "-u", "RAY_AUTH_TOKEN", "RANK=0", "HEAD=127.0.0.1", "bash", *job]
    done = subprocess.run(words, cwd=repository, env=environment(repository), capture_output=True, text=True)
    assert (done.returncode, calls(repository)) == (2, [])
    assert done.stderr == "error: RAY_AUTH_TOKEN is not set; give all machines the same one\n"


def test_a_slice_gets_the_token_as_a_file_and_one_command(repository):
    printed = launch(repository, *POD, "--ray", "--dry_run", "--", *COMMAND).stdout
    lines = [shlex.split(line) for line in printed.splitlines()]
    (copied,) = (words for words in lines if "scp" in words and "pod:arrag_jax_run.token" in words)
    start = option(next(words for words in lines if "launch/ray_job.sh" in " ".join(words)), "command")
    assert "--worker=all" in copied and "RAY_AUTH_TOKEN_PATH=../../arrag_jax_run.token bash launch/ray_job.sh" in start
    pin = next(line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if line.startswith("ray=="))
    assert pin in printed
    assert list((repository / "tmp").iterdir()) == []


def test_files_for_clusters_are_valid_and_ask_for_a_token():
    yaml, util = pytest.importorskip("yaml"), pytest.importorskip("ray.autoscaler._private.util")
    cluster = yaml.safe_load((ROOT / "launch" / "ray_cluster.yaml").read_text())
    util.validate_config(cluster | {"cluster_synced_files": []})  # which Ray adds itself
    for side in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in cluster[f"{side}_start_ray_commands"][-1]
    job = yaml.safe_load((ROOT / "launch" / "ray_job.yaml").read_text())["spec"]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    pin = next(line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if line.startswith("ray=="))
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" == pin


CLOUD = ["launch/ray_cloud.sh", "aws"]


@pytest.mark.parametrize("ends_with", [0, 3])
def test_rented_machines_are_given_back_however_the_command_ends(repository, ends_with):
    (repository / ".ray").mkdir()
    (repository / ".ray" / "auth_token").write_text("token")
    write_stub(repository / "stubs" / "ray", f"[[ $1 != exec ]] || exit {ends_with}\n")
    done = launch(repository, *CLOUD, "--", *COMMAND, home=repository)
    assert done.returncode == ends_with, done.stderr
    up, ran, down = calls(repository)
    assert up[1:] == ["up", "--yes", "launch/ray_cluster.yaml"] and down[1:] == ["down", "--yes", up[-1]]
    assert shlex.split(ran[-1])[3:] == [".venv/bin/python", *COMMAND[1:], "--ray=auto"]
    launch(repository, *CLOUD, "--keep", "--", *COMMAND, home=repository)
    assert [call[1] for call in calls(repository)[3:]] == ["up", "exec"]


def test_a_job_on_kubernetes_gets_the_command_as_it_was_given(repository):
    write_stub(repository / "stubs" / "kubectl", "")
    done = launch(repository, CLOUD[0], "kubernetes", "--", *COMMAND, '--a="b" \\')
    assert done.returncode == 0, done.stderr
    patch = next(call for call in calls(repository) if "patch" in call)
    entry = json.loads(patch[patch.index("-p") + 1])["spec"]["entrypoint"]
    assert shlex.split(entry) == [*COMMAND, '--a="b" \\', "--ray=auto"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*POD, "--colour=red", "--", *COMMAND], "--colour"),
        ([*SLURM, "--colour=red", "--", *COMMAND], "--colour=red"),
        (["launch/ray_job.sh", "--colour=red", "--", *COMMAND], "--colour=red"),
        (["launch/ray_job.sh", "--", "python", "train.py"], "python -m arrag_jax"),
        (["launch/ray_cloud.sh", "--", *COMMAND], "aws or kubernetes"),
        ([*CLOUD, "--colour=red", "--", *COMMAND], "--colour=red"),
        ([*CLOUD, "--", "python", "train.py"], "python -m arrag_jax"),
        (CLOUD, "command is missing"),
        (POD, "command is missing"),
        (SLURM, "command is missing"),
        ([*POD, "--", "rm", "-rf", "x"], "python -m arrag_jax"),
        ([*SLURM, "--", "python", "train.py"], "python -m arrag_jax"),
        ([*POD[:-2], "--", *COMMAND], "--type is missing"),
        ([POD[0], "--", *COMMAND], "--name is missing"),
        ([*POD, "--project"], "--project needs a value"),
        ([*POD, "--delete", "--", *COMMAND], "--delete takes no command"),
        ([*POD, "--slices=none", "--", *COMMAND], "--slices=none"),
        ([*POD, "--spot", "--reserved", "--", *COMMAND], "exclude"),
        ([*POD, "--slices=2", "--ray", "--", *COMMAND], "one slice"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(repository, words, said):
    done = launch(repository, *words)
    assert (done.returncode, done.stdout, calls(repository)) == (2, "", [])
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


@pytest.mark.parametrize(("target", "tools"), [("demo", False), ("test", True), ("lint", True), ("install", True)])
def test_only_what_checks_the_code_installs_the_test_tools(target, tools):
    words = ["make", "--dry-run", "--always-make", target]
    steps = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-r requirements.txt" in steps
    assert ("requirements-dev.txt" in steps) == tools
