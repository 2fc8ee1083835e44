"""Checkpoints of a run: state and data position together in one step directory, written in the background.

Orbax writes a step under a temporary name and renames it when whole, so a kill at any moment leaves
either the whole step or none of it.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError

State = TypeVar("State")
KEEP = 2  # the newest, and the one before it in case the newest is damaged

# Keys that may differ between a run and its continuation: they change when, where or how long, not what.
FREE_KEYS = ("steps", "log_every", "eval_every", "checkpoint_every", "mesh", "data.data_dir", "data.eval_examples")


class Checkpoints:
    """The checkpoints under one run's workdir."""

    def __init__(self, workdir: Path):
        logging.set_verbosity(logging.ERROR)  # orbax logs a page a save
        self._directory = (workdir / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any, data: grain.DatasetIterator) -> None:
        """Starts to save; the arrays are copied before this returns, the files are written after. Once a step."""
        if step not in self._manager.all_steps():
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
            self._manager.save(step, args=args)

    def restore(self, state: State, data: grain.DatasetIterator) -> State | None:
        """The newest saved state, laid out as ``state`` is; moves ``data`` to its place. None: no checkpoint.

        Raises:
          UserError: where the checkpoint is damaged or is another model's.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data)
        )
        try:
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:  # orbax, tensorstore and json raise many kinds for one cause
            reason = str(error).strip().splitlines()
            raise UserError(
                f"checkpoint {self._directory / str(step)} is damaged or belongs to another model "
                f"({type(error).__name__}: {reason[0] if reason else ''}); "
                "delete that folder to continue from the one before it"
            ) from error

    def wait(self) -> None:
        """Returns when every save is whole on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()  # waits for the saves under way


def claim_workdir(workdir: Path, config: TrainConfig) -> None:
    """Writes ``config.json``, or checks that the run which is there has the same config.

    Raises:
      UserError: naming the keys that differ, where they change what is trained.
    """
    path = workdir / "config.json"
    new = json.loads(json.dumps(dataclasses.asdict(config), default=lambda value: value.to_dict()))
    if path.exists():
        old = _flat(json.loads(path.read_text()))
        fresh = _flat(new)
        differ = [key for key in sorted(old.keys() | fresh.keys()) if old.get(key) != fresh.get(key) and not _free(key)]
        if differ:
            changes = ", ".join(f"{key} ({old.get(key)!r} there, {fresh.get(key)!r} now)" for key in differ)
            raise UserError(f"{workdir} holds a run of another config: {changes}; choose another --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(new, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
