"""Commands of README and docs/, word for word and in order, in a scratch folder; the long ones are named and parsed."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig
from arrag_jax.data.emoji.scenes import render, scene
from helpers import children
from helpers.folders import write_scenes
from helpers.in_turn import parse_in_turn, run_in_turn
from helpers.published import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# docs/ in the order in which the commands run; LOG.md tells of commands of its day.
PAGES = (
    *("architecture", "drawing", "stores", "search", "checkpoints", "training", "results", "speed", "clusters"),
    *("repeatability", "reference", "keys", "benchmarks", "parts", "studio"),
)
TEXT = "\n".join([README, *((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)])

# What is not run here, by how it begins: trainings and measurements of minutes or hours, whose keys and flags are
# parsed, and what needs their results.
TAKES_LONG = (
    "python -m arrag_jax.train ",
    "python -m arrag_jax.eval ",
    "python -m arrag_jax.build_neighbors ",
    "python -m arrag_jax.build_datastore --config configs/emoji_datastore.py ",
    "python -m arrag_jax.generate --config configs/emoji_compare.py ",  # of the tuned models
)
# In commands that need a cluster that runs already, or a compiler for another machine: they are parsed.
OF_OTHER_MACHINES = ("--ray=auto", "retrieval.search=ray", "--topology=")
# What is no command of this package, and why it is not run.
ELSEWHERE = {
    "make ": "installs packages; CI runs it",
    "pip install ": "installs packages",
    "ray get-auth-token": "writes into the home folder",
    "python -m arrag_jax.studio ": "runs until it is stopped; tests/test_studio_browser.py starts it",
    "python -m arrag_jax.serve ": "runs until it is stopped; tests/test_curl.py starts it",
    "mkdir -p runs/prior_hour && git archive": "needs the whole history",
    "export XLA_FLAGS": "for the training after it",
    "sbatch ": "needs SLURM",
    "python benchmarks/": "measures for minutes",
}


def blocks() -> list[str]:
    """The code blocks of commands; those of a language, or of text, name it."""
    return [block for language, block in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if not language]


def commands() -> list[str]:
    """Every command of those blocks, in order, without comments."""
    lines = [line for block in blocks() for line in block.replace("\\\n", " ").split("\n")]
    return [re.sub(r" {2,}", " ", re.sub(r"\s{2,}#.*", "", line)).strip() for line in lines if line.strip()]


def spans() -> list[str]:
    """Commands inside sentences, as they stand there, but for those that leave something out."""
    found = re.findall(r"`(python\s-m\sarrag_jax\.[^`]*)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    return [" ".join(each.split()) for each in found if "…" not in each and "COMMAND" not in each]


def starts(command: str, beginnings) -> bool:
    return any(command.startswith(beginning) for beginning in beginnings)


def runnable() -> list[str]:
    left_out = (*TAKES_LONG, *ELSEWHERE, "launch/")
    return [x for x in commands() if not starts(x, left_out) and not any(part in x for part in OF_OTHER_MACHINES)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What the pages take for given: configs and launch scripts, photos, stores that exist already, a checkpoint."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copyfile(ROOT / "requirements.txt", folder / "requirements.txt")
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x@x commit -qm x"):  # tpu_pod.sh copies a commit
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    write_checkpoint(folder / "checkpoints" / "Janus-Pro-1B")
    for name, numbers in (("photos", range(12, 24)), ("more_photos", range(24, 30))):
        write_scenes(folder / name, numbers)
        for number in numbers:
            (folder / name / f"scene_{number}.txt").write_text(scene("store", number).caption)
    Image.fromarray(render(scene("store", 0))).save(folder / "photo.png")
    mask = np.zeros((48, 48), np.uint8)
    mask[12:36, 12:36] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    model = "arrag_jax/assets/emoji_janus"
    small = DatastoreConfig(model, "emoji_scenes/tiny", data_dir=str(folder / "data"), captions=True)
    build_datastore.run(small, str(folder / "runs" / "store"))
    taught = dataclasses.replace(small, keys=("codebook", "hidden"), indexes=())
    build_datastore.run(taught, str(folder / "demo" / "store"))  # `make demo` builds it, with more images
    more = DatastoreConfig(model, str(folder / "more_photos"), indexes=())
    build_datastore.run(more, str(folder / "runs" / "more_photos"))
    return folder


@pytest.mark.long
@pytest.mark.slow
def test_every_command_runs_as_it_stands(clone):
    done = run_in_turn(clone, *runnable())
    assert len(done) >= 10
    for script in (x for x in commands() if x.startswith("launch/")):
        script = (
            script if "--dry_run" in script else script.replace(" -- ", " --dry_run -- ", 1)
        )  # it would rent machines
        ran = subprocess.run(shlex.split(script), cwd=clone, capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stderr
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    words = [sys.executable, "-c", snippet]
    ran = subprocess.run(
        words, cwd=clone, env=children.alone(), capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


def test_every_page_is_read():
    assert {f"{page}.md" for page in PAGES} | {"LOG.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_the_long_ones_parse():
    """Their configs, keys and flags are known, those of a task's options too."""
    own = [x for x in commands() if starts(x, TAKES_LONG) or any(part in x for part in OF_OTHER_MACHINES)]
    launched = [x.partition(" -- ")[2] for x in commands() if " -- python -m" in x]
    assert len(own) >= 12 and len(launched) == 4 and len(spans()) >= 8
    parse_in_turn(ROOT, *own, *launched, *spans())


def test_every_command_is_run_or_named():
    for command in commands():
        assert command.startswith(("python -m arrag_jax.", "launch/")) or starts(command, ELSEWHERE), command
    for beginning in (*TAKES_LONG, *ELSEWHERE):
        assert any(command.startswith(beginning) for command in commands()), beginning
