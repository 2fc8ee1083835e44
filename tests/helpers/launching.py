"""A copy of the launch scripts with stand-ins for what they call, which record how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POD = ["launch/tpu_pod.sh", "--name", "pod", "--zone=us-east5-b", "--type", "v6e-16"]
SLURM = ["launch/gpu_slurm.sh"]
END = "(end)"
COMMAND = ["python", "-m", "arrag_jax.generate", '--prompt=a cat\'s "red" $HOME `id` \\ hat', "--x=", "two  spaces"]

# Stands in for training: saves when it is told to stop. In Python, since a shell may lose a trap that fires
# while it parses.
STOPPABLE = """exec python3 -c '
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("started", flush=True)
print("saved" if signal.sigtimedwait({signal.SIGTERM}, 60) else "never told", flush=True)'
"""

# Stands in for gcloud: a queued resource whose state lies in a file, and machines whose logs end at once. The lines of
# the file ``ends`` say how the command of worker 0 ends, one after another: its exit code and the state after it.
GCLOUD = """state=$CALLS.state ends=$CALLS.ends
case "$3 $4" in
  "queued-resources describe")
    [[ -e $state ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    printf '%s\\t%s\\n' "$(<"$state")" "$(<"$state.made")" ;;
  "queued-resources create") echo ACTIVE >"$state"; date +%s%N >"$state.made" ;;
  "queued-resources delete") rm "$state" ;;
  "tpu-vm describe") echo READY ;;
  "tpu-vm ssh")
    for word in "$@"; do [[ $word != --output-directory=* ]] || { echo log >"${word#*=}/0.log"; exit; }; done
    if [[ -s $ends ]]; then
      read -r code after <"$ends"; sed -i 1d "$ends"
      echo "$after" >"$state"
      exit "$code"
    fi ;;
esac
"""


def make_repository(tmp_path: Path) -> Path:
    """A committed copy of the scripts, with stubs first in PATH that record how they were called."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, root)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(root)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    (root / "tmp").mkdir()
    for name in ("scontrol", "python"):
        write_stub(root / "stubs" / name, "")
    write_stub(root / "stubs" / "srun", 'shift 2; exec "$@"\n')
    write_stub(root / "stubs" / "gcloud", GCLOUD)
    return root


def write_stub(path: Path, body: str) -> None:
    """It records its call as its words and END, each ended by NUL, in one write, because calls may overlap."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/bash\nprintf "%s\\0" "${{0##*/}}" "$@" "{END}" >>"$CALLS"\n{body}')
    path.chmod(0o755)


def environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{root / 'stubs'}:{os.environ['PATH']}",
        "CALLS": str(root / "calls"),
        "TMPDIR": str(root / "tmp"),
        "SLURM_JOB_ID": "7",
        "POLL": "1",
    }


def launch(root: Path, *words: str, home: Path | None = None) -> subprocess.CompletedProcess:
    env = environment(root) | ({} if home is None else {"HOME": str(home)})
    return subprocess.run(["bash", *words], cwd=root, env=env, capture_output=True, text=True, timeout=60)


def calls(root: Path) -> list[list[str]]:
    path = root / "calls"
    return [text.split("\0") for text in path.read_text().split(f"\0{END}\0")[:-1]] if path.exists() else []


def option(words: list[str], name: str) -> str:
    return next(word.removeprefix(f"--{name}=") for word in words if word.startswith(f"--{name}="))
