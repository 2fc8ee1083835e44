"""Exports a checkpoint of a run as a model folder.

This serves for a run that was killed before its own export, or for the best checkpoint of any run.
"""

import dataclasses
from pathlib import Path

from flax import nnx

from arrag_jax.config import MeshConfig, TrainConfig
from arrag_jax.json_files import read_json
from arrag_jax.mesh import make_mesh
from arrag_jax.training.checkpoint import read_config, read_params, require_base
from arrag_jax.training.loop import export, origin
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.task import Task
from arrag_jax.training.tasks import make_task


def summary(workdir: Path) -> str:
    """Returns one line about a finished run: the held-out metrics of its export, and the export's folder."""
    folder = workdir / "export"
    manifest = read_json(folder / "manifest.json")
    figures = ", ".join(f"{name} {value:g}" for name, value in manifest["figures"].items())
    return f"trained {manifest['step']:,} steps; held out: {figures}; the model is in {folder}"


def export_run(workdir: Path, target: Path, last: bool = False) -> int:
    """Writes ``target``, a model folder, from a checkpoint of the run in ``workdir``; returns the checkpoint's step.

    Args:
      target: a new folder.
      last: export the last checkpoint instead of the best one.

    Raises:
      UserError: if there is no complete checkpoint, or if the content of the folders that the run's config names has
        changed since the run started.
    """
    config = read_config(workdir)
    return export_checkpoint(make_task(config), config, workdir, target, last)


def export_checkpoint(task: Task, config: TrainConfig, workdir: Path, target: Path, last: bool = False) -> int:
    """Does the same as ``export_run`` for a task object, with the config of its run."""
    require_base(workdir, task.base())
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=1))
    mesh = make_mesh(config.mesh)
    graph, frozen, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    step, params = read_params(workdir, state.params, task.best_metric, "--source", last)
    export(task, nnx.merge(graph, params, frozen, state.rest), target, origin(workdir, config, step))
    return step
