"""Checkpoints of a run: state and data position together in one directory per step, written in the background.

Orbax writes a step under a temporary name and renames it when it is complete. A kill at any moment therefore leaves
either the complete step or nothing of it. Frozen weights are not part of a checkpoint; ``base.json`` identifies them.
All processes share one data position (``make_loader``), so a run may continue with another number of processes.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.failures import is_of_the_machine
from arrag_jax.files import exclusive_lock, folder_in, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import differences, parse
from arrag_jax.training.announced import Announcer
from arrag_jax.training.sums import digest_of, read_sums, require_finite, require_same, sums_of

State = TypeVar("State")
asyncio_log = getLogger("asyncio")
KEEP = 2  # the newest, and the one before it in case the newest is damaged; the best one is kept in addition

# Keys that may differ between a run and its continuation. They change when, where or how long the run trains, or only
# its sample images, but not what it trains. init_from is not read once the run has its own checkpoint. Folders may
# move, because base.json identifies their content. prompt_length only changes the padding of prompts.
FREE_KEYS = (
    "steps", "log_every", "eval_every", "checkpoint_every", "mesh", "remat", "init_from", "data.data_dir",
    "data.eval_examples", "data.max_bad_fraction", "data.min_bad",
    "options.base", "options.neighbors", "options.tokenizer", "options.retrieval", "options.daid", "options.sampling",
    "options.cfg_scale", "options.prompt_length",
)  # fmt: skip


class Checkpoints:
    """The checkpoints in one run's workdir: the newest ones, and the best of all that were evaluated."""

    def __init__(self, workdir: Path, best_metric: tuple[str, str]):
        """Opens the checkpoints of ``workdir``.

        Args:
          best_metric: the held-out metric that selects the best checkpoint, and whether its "min" or its "max" is best.
        """
        logging.set_verbosity(logging.ERROR)  # otherwise orbax logs a page per save
        self._directory = folder_in(workdir, "checkpoints").resolve()
        best = _best(best_metric)
        by_metric = BestN(
            get_metric_fn=best["best_fn"],
            reverse=best["best_mode"] == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = AnyPreservationPolicy([LatestN(KEEP), by_metric])
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True, **best)
        _require_metrics(self._directory)
        with _reading(self._directory, "delete what is damaged there to continue without it"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._announcer = Announcer(self._directory)

    def save(
        self, step: int, state: Any, data: grain.DatasetIterator, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts a save, if this step is not saved yet.

        The arrays are copied before this returns; the files are written later.

        Args:
          metrics: the held-out metrics of this state; None if it was not evaluated.
        """
        if step not in self._manager.all_steps():
            position = data.get_state()
            sums = dataclasses.asdict(sums_of(state, position, metrics))
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position), sums=ocp.args.JsonSave(sums)
            )
            self.wait()
            self._manager.save(step, args=args, metrics=metrics)
            self._announcer.saving(step)

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint among those with metrics; None if there is none."""
        return self._manager.best_step()

    def restore(self, state: State, data: grain.DatasetIterator) -> State | None:
        """Returns the newest saved state, laid out as ``state`` is; None if there is no checkpoint.

        Also moves ``data`` to the saved position.

        Raises:
          UserError: if the checkpoint is damaged or belongs to another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        path = self._directory / str(step)
        with _reading(path, "delete that folder to continue from the one before it"):
            saved, sums = self._manager.restore(step, args=args), read_sums(path)
            if sums is not None:
                require_same(sums.state, saved["state"])
                if digest_of(saved["data"]) != sums.data:
                    raise ValueError("its data position is not what was saved")
            data.set_state(saved["data"])
        return saved["state"]

    def wait(self) -> None:
        """Returns when every save is complete on disk, and at the address that the workdir stands for, if any."""
        self._manager.wait_until_finished()
        self._announcer.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.closing(self._announcer):
            self._manager.close()  # waits for pending saves


def read_params(
    workdir: Path, params: PyTree, best_metric: tuple[str, str], named: str = "init_from", last: bool = False
) -> tuple[int, PyTree]:
    """Returns trained parameters of another run: those of its best checkpoint, or of its last one if none has metrics.

    The other run may still be in progress.

    Args:
      workdir: workdir of the other run.
      params: arrays with the expected shapes; the result is laid out as they are.
      best_metric: as for ``Checkpoints``.
      named: name of the flag or key that gave the workdir, for messages.
      last: use the last checkpoint in any case.

    Returns:
      The checkpoint's step, and the moving average of its parameters if it has one, else the parameters.

    Raises:
      UserError: if there is no run, a checkpoint is damaged, or its parameters have other names or shapes.
    """
    directory = (workdir / "checkpoints").resolve()
    step = None
    if directory.is_dir():
        _require_metrics(directory)
        options = ocp.CheckpointManagerOptions(read_only=True, **_best(best_metric))
        with _reading(directory, f"choose another {named}"):
            manager = ocp.CheckpointManager(directory, options=options)
        with contextlib.closing(manager):
            best = None if last else manager.best_step()
            step = manager.latest_step() if best is None else best
    if step is None:
        raise UserError(f"{named}={workdir} holds no checkpoint; give the workdir of a run that has saved one")
    path, reader = directory / str(step), ocp.PyTreeCheckpointer()
    with _reading(path, f"choose another {named}"):
        saved = reader.metadata(path / "state").item_metadata.tree
        name = "params" if saved["ema"] is None else "ema"
        there, here = _shapes(saved[name]), _shapes(params)
        if there != here:
            changes = differences(there, here)
            raise UserError(f"{named}={workdir} holds parameters of another model: {changes}; choose another run")
        item = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        restored, sums = reader.restore(path / "state", args=args)[name], read_sums(path)
        if sums is not None:
            require_same(sums.state, restored, f"{name}/")
        require_finite(restored)
        return step, restored


def _require_metrics(directory: Path) -> None:
    """Raises UserError unless the metrics that select the best checkpoint are the ones that were saved."""
    for file in sorted(directory.glob("*/metrics/metrics")):
        path = file.parent.parent
        with _reading(path, "delete that folder to go on without it"):
            metrics, sums = json.loads(file.read_bytes()), read_sums(path)
            if sums is not None and digest_of(metrics) != sums.metrics:
                raise ValueError("its metrics are not what was saved")


def newest_step(workdir: Path) -> int | None:
    """Returns the step of the newest checkpoint of the run in ``workdir``; None if it has none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=None)


@contextlib.contextmanager
def claimed(workdir: Path, config: TrainConfig, base: dict[str, str]) -> Iterator[None]:
    """Locks the workdir for this run, and writes ``config.json`` and ``base.json``.

    If a run has left a checkpoint there, config and base must be the same as its own.

    Args:
      base: identity of the origin of frozen weights, by name.

    Raises:
      UserError: if another run uses the workdir; if config or base differ in what changes the training (the message
        names the difference); or if a file is damaged.
    """
    if jax.process_index():
        _check_records(workdir, config, base)
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(workdir):
        record = _check_records(workdir, config, base)
        write_json(workdir / "base.json", base)
        write_json(workdir / "config.json", record)
        yield


def read_config(workdir: Path) -> TrainConfig:
    """Returns the config of the run in ``workdir``.

    Raises:
      UserError: if the file is damaged, or comes from a version with other keys.
    """
    return parse(TrainConfig, _read_record(workdir, {}), str(workdir / "config.json"))


def _check_records(workdir: Path, config: TrainConfig, base: dict[str, str]) -> dict[str, Any]:
    """Returns the config as it is to be written, after a comparison with the recorded one.

    Nothing is compared if the run has saved no step.
    """
    new = json.loads(json.dumps(dataclasses.asdict(config), default=lambda value: value.to_dict()))
    if not any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        return new
    old = _flat(_read_record(workdir, new))
    differ = differences(
        {key: value for key, value in old.items() if not _free(key)},
        {key: value for key, value in _flat(new).items() if not _free(key)},
    )
    if differ:
        raise UserError(f"{workdir} holds a run of another config: {differ}; choose another --workdir")
    require_base(workdir, base)
    return new


def require_base(workdir: Path, base: dict[str, str]) -> None:
    """Raises UserError if the run in ``workdir`` has other frozen weights (``Task.base``); it names the difference."""
    differ = differences(_read_json(workdir / "base.json", base), base)
    if differ:
        raise UserError(
            f"{workdir} holds a run on another base: {differ}; give back the one it began with "
            "or choose another --workdir"
        )


def _best(best_metric: tuple[str, str]) -> dict[str, Any]:
    """Returns Orbax's options for the best checkpoint.

    A checkpoint whose metric is missing or NaN counts as the worst.
    """
    name, mode = best_metric
    worst = math.inf if mode == "min" else -math.inf

    def value_of(metrics: Mapping[str, float]) -> float:
        value = metrics.get(f"eval/{name}", math.nan)
        return worst if math.isnan(value) else value

    return {"best_fn": value_of, "best_mode": mode}


@contextlib.contextmanager
def _reading(path: Path, mend: str) -> Iterator[None]:
    """Turns any error while the checkpoint at ``path`` is read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax, tensorstore and json raise many types for one cause
        if is_of_the_machine(error):
            raise
        # pending reads fail for the same reason, and asyncio would print a traceback for each
        asyncio_log.setLevel("CRITICAL")
        reason = str(error).strip().splitlines()
        raise UserError(
            f"checkpoint {path} is damaged or belongs to another model "
            f"({type(error).__name__}: {reason[0] if reason else ''}); {mend}"
        ) from error


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _read_record(workdir: Path, absent: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the run in ``workdir``, or ``absent``.

    In a record of an earlier version, "data.name" is renamed to "data.source".
    """
    record = _read_json(workdir / "config.json", absent)
    data = record.get("data")
    if isinstance(data, dict) and "name" in data:
        record = record | {"data": {("source" if key == "name" else key): value for key, value in data.items()}}
    return record


def _read_json(path: Path, absent: dict[str, Any]) -> dict[str, Any]:
    """Returns the object in a JSON file, or ``absent`` if there is no such file."""
    try:
        return read_object(path) if path.exists() else absent
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); delete it to continue this run without it") from error


def _free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a flat dict: {"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
