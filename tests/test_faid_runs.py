"""The command that trains FAiD: killed and restarted, and in two processes, it trains as if nothing had happened."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import children
import numpy as np
import pytest
import workshop
from toy import assert_same_bits, by_path

from arrag_jax.config import MeshConfig
from arrag_jax.data.pipeline import make_loader
from arrag_jax.mesh import make_mesh
from arrag_jax.training.checkpoint import Checkpoints
from arrag_jax.training.loop import init_state
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.tasks import make_task

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny base with its store and neighbour sets."""
    path = tmp_path_factory.mktemp("workshop")
    workshop.build(path)
    return path


def start(folder: Path, workdir: Path, *changes: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """``arrag_jax.train`` on configs/emoji_faid.py, with the tiny base."""
    options = {
        "base": folder / "model", "neighbors": folder / "neighbors", "retrieval.store": folder / "store",
        "retrieval.k": workshop.STORED, "retrieval.search": "dense", "faid.neighbors": workshop.K, "faid.stride": 1,
        "lora.rank": 2,
    }  # fmt: skip
    changes += ("batch_size=4", "log_every=1", "eval_every=1000", "data.eval_examples=8")
    command = [sys.executable, "-m", "arrag_jax.train", "--config=configs/emoji_faid.py", f"--workdir={workdir}"]
    command += [f"--config.options.{key}={value}" for key, value in options.items()]
    command += [f"--config.{change}" for change in changes]
    return subprocess.Popen(command, cwd=ROOT, env=env or children.alone(), stderr=subprocess.PIPE, text=True)


def losses(workdir: Path) -> dict[int, float]:
    """Of the whole lines of ``metrics.jsonl``, which may be being written."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, whole) if "loss" in line}


def final_state(folder: Path, workdir: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint by its path."""
    written = json.loads((workdir / "config.json").read_text())
    config = workshop.config(folder, written["options"], mesh=MeshConfig(1, 1))
    task = make_task(config)
    _, _, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, make_mesh(config.mesh))
    with Checkpoints(workdir, task.selects) as checkpoints:
        return by_path(checkpoints.restore(state, make_loader(task.train_source(), config.batch_size, config.seed)))


def test_killed_three_times_is_uninterrupted(folder, tmp_path):
    moments, whole, parts = random.Random(0), tmp_path / "whole", tmp_path / "parts"
    changes = ("steps=90", "checkpoint_every=7")
    process = start(folder, whole, *changes)
    assert process.wait() == 0, process.stderr.read()
    for after in (8, 30, 55):
        process = start(folder, parts, *changes)
        while process.poll() is None and max(losses(parts), default=0) < after:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    process = start(folder, parts, *changes)
    assert process.wait() == 0, process.stderr.read()
    assert_same_bits(final_state(folder, whole), final_state(folder, parts))
    assert losses(whole) == losses(parts)
    weights = [(workdir / "export" / "model.safetensors").read_bytes() for workdir in (whole, parts)]
    assert weights[0] == weights[1]


def test_two_processes_train_as_one_does(folder, tmp_path):
    """On four devices, fully sharded two ways; dropped captions and LoRA's dropout included."""
    changes = ("steps=5", "checkpoint_every=5", "mesh.data=2", "mesh.fsdp=2")
    processes = [start(folder, tmp_path / "two", *changes, env=env) for env in children.together(2, devices=2)]
    processes.append(start(folder, tmp_path / "one", *changes, env=children.alone(devices=4)))
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
