"""--help tells all that a command and its config take."""

import dataclasses
import importlib
import subprocess

import pytest
from test_numbers import sections

from arrag_jax.config import DatastoreConfig, DrawConfig, NeighborsConfig, TrainConfig
from arrag_jax.fields import hints
from arrag_jax.training.tasks import TASKS
from arrag_jax.usage import meanings
from helpers import running

CONFIGS = {
    "train": TrainConfig,
    "generate": DrawConfig,
    "eval": DrawConfig,
    "build_datastore": DatastoreConfig,
    "build_neighbors": NeighborsConfig,
    "convert": None,
}


def keys(cls: type, prefix: str):
    for field in dataclasses.fields(cls):
        hint = hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", field


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", CONFIGS)
def test_help_is_the_module_s_text_its_flags_and_every_key_with_its_default(capsys, monkeypatch, command, flag):
    done = running.run(capsys, monkeypatch, command, flag)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(importlib.import_module(f"arrag_jax.{command}").__doc__.strip())
    assert "--target" in done.out if command == "convert" else "--workdir" in done.out
    wanted = [*keys(CONFIGS[command], "config")] if CONFIGS[command] else []
    if command == "train":
        wanted += [key for _, options in TASKS.values() for key in keys(options, "config.options")]
        assert all(f"where config.task is {task!r}" in done.out for task in TASKS)
    for name, field in wanted:
        default = "required" if field.default is dataclasses.MISSING else f"default {field.default!r}"
        assert any(
            line.startswith(f"  {name} (") and line.endswith(f", {default})") for line in done.out.splitlines()
        ), name


@pytest.mark.slow
def test_something_is_said_of_every_key():
    bases = (TrainConfig, DrawConfig, DatastoreConfig, NeighborsConfig, *(options for _, options in TASKS.values()))
    for base in bases:
        for cls in sections(base).values():
            plain = [f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints(cls)[f.name])]
            assert [name for name in plain if not meanings(cls).get(name)] == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", ["tpu_pod.sh", "gpu_slurm.sh"])
def test_launch_scripts_tell_their_options(script, flag):
    words = ["bash", f"launch/{script}", flag]
    done = subprocess.run(words, cwd=running.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    options = {"tpu_pod.sh": ["--name", "--zone", "--type", "--spot", "--delete"], "gpu_slurm.sh": []}[script]
    assert all(option in done.stdout for option in [*options, "--dry_run", "--help", "python -m arrag_jax."])
    assert "SBATCH" not in done.stdout and "set -euo" not in done.stdout
