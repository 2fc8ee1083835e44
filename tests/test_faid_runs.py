"""The command that trains FAiD: killed and restarted, and in two processes, it trains as if nothing had happened."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arrag_jax.config import MeshConfig
from arrag_jax.training.tasks import make_task
from helpers import children, workshop
from helpers.toy import assert_same_bits, final_state, kill, lines, losses, split_leaves

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny base with its store and neighbour sets."""
    path = tmp_path_factory.mktemp("workshop")
    workshop.build(path)
    return path


# The command, with leaves of the tiny model spread over devices as those of a large one are.
SPREAD = (
    f"import runpy; from arrag_jax import mesh; mesh.SMALLEST_SHARDED = {workshop.SPREAD}; "
    "runpy.run_module('arrag_jax.train', run_name='__main__', alter_sys=True)"
)


def start(
    folder: Path, workdir: Path, *changes: str, env: dict[str, str] | None = None, spread: bool = False
) -> subprocess.Popen:
    """``arrag_jax.train`` on configs/emoji_faid.py, with the tiny base."""
    options = {
        "base": folder / "model", "neighbors": folder / "neighbors", "retrieval.store": folder / "store",
        "retrieval.k": workshop.STORED, "retrieval.search": "dense", "faid.neighbors": workshop.K, "faid.stride": 1,
        "lora.rank": 2,
    }  # fmt: skip
    changes += ("batch_size=4", "log_every=1", "data.eval_examples=8")
    program = ["-c", SPREAD] if spread else ["-m", "arrag_jax.train"]
    command = [sys.executable, *program, "--config=configs/emoji_faid.py", f"--workdir={workdir}"]
    command += [f"--config.options.{key}={value}" for key, value in options.items()]
    command += [f"--config.{change}" for change in changes]
    return subprocess.Popen(command, cwd=ROOT, env=env or children.alone(), stderr=subprocess.PIPE, text=True)


def end_of(folder: Path, workdir: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint by its path."""
    written = json.loads((workdir / "config.json").read_text())
    config = workshop.config(folder, written["options"], mesh=MeshConfig(1, 1))
    return final_state(workdir, config, make_task(config))


def test_killed_three_times_is_uninterrupted(folder, tmp_path):
    """Evaluated, and its best checkpoints saved, between the kills, of which one may fall into an evaluation."""
    moments, whole, parts = random.Random(0), tmp_path / "whole", tmp_path / "parts"
    changes = ("steps=45", "checkpoint_every=7", "eval_every=15")
    process = start(folder, whole, *changes)
    assert process.wait() == 0, process.stderr.read()
    for after in (8, 20, 30):
        kill(start(folder, parts, *changes), parts, after, moments.uniform(0, 0.05))
    process = start(folder, parts, *changes)
    assert process.wait() == 0, process.stderr.read()
    assert_same_bits(end_of(folder, whole), end_of(folder, parts))
    judged = [{line["step"]: line for line in lines(workdir) if "loss" not in line} for workdir in (whole, parts)]
    assert list(judged[0]) == [15, 30, 45]
    assert judged[0] == judged[1]
    assert losses(whole) == losses(parts)
    kept = [sorted(path.name for path in (workdir / "checkpoints").iterdir()) for workdir in (whole, parts)]
    assert kept[0] == kept[1]
    weights = [(workdir / "export" / "model.safetensors").read_bytes() for workdir in (whole, parts)]
    assert weights[0] == weights[1]


def test_two_processes_train_as_one_does(folder, tmp_path):
    """On four devices, fully sharded two ways; dropped captions and LoRA's dropout included."""
    changes = ("steps=5", "checkpoint_every=5", "eval_every=5", "mesh.data=2", "mesh.fsdp=2")
    processes = [
        start(folder, tmp_path / "two", *changes, env=env, spread=True) for env in children.together(2, devices=2)
    ]
    processes.append(start(folder, tmp_path / "one", *changes, env=children.alone(devices=4), spread=True))
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    for name in ("one", "two"):
        assert split_leaves(tmp_path / name) >= workshop.BLENDER_KERNELS
