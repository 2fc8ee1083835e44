"""Outputs of a run's metrics: a progress bar, ``metrics.jsonl``, TensorBoard files and sample images."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from arrag_jax import progress
from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.figures.grids import save
from arrag_jax.files import atomic_write, folder_in
from arrag_jax.training.tensorboard import TensorBoardFile, summary

SHOWN_EXAMPLES = 8  # number of examples named in a message about a loss that is not finite
WATCHED = {"loss": "the loss", "grad_norm": "the gradient's norm"}  # a run ends if one of them is not finite


class Journal:
    """Follows a run step by step.

    The metrics of a step are fetched when the next step has been dispatched, so the device never waits for the host. A
    log line holds the means since the previous line. Its pace leaves out the first step of a process, which includes
    compilation, unless that is the only step of the line. Only process 0 writes and shows anything. Every process
    stops at a loss or gradient that is not finite.
    """

    def __init__(self, config: TrainConfig, tokens: int, workdir: Path, done: int):
        """Opens the journal of a run.

        Args:
          tokens: number of tokens per example.
          done: number of steps that are already finished.
        """
        self._log_every, self._steps = config.log_every, config.steps
        self._step_tokens = tokens * config.batch_size
        self._pending: tuple[int, Mapping[str, jax.Array], Int[np.ndarray, " B"]] | None = None
        self._window: list[dict[str, float]] = []
        self._seconds, self._mark = 0.0, time.monotonic()  # time of the window so far, and its end
        self._first: float | None = None  # seconds of this process's first step, which includes compilation
        leads = jax.process_index() == 0
        self._writer = MetricWriter(workdir, done) if leads else None
        self._bar = progress.bar(wanted=leads, total=config.steps, initial=done, unit="step")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def step_done(self, step: int, metrics: Mapping[str, jax.Array], examples: Int[np.ndarray, " B"]) -> None:
        """Records a step that has just been dispatched, and writes the step before it.

        Args:
          examples: the numbers of this process's examples in the source.
        """
        self.flush()
        self._pending = step, metrics, examples

    def flush(self) -> None:
        """Waits for the last step and writes it.

        Raises:
          UserError: if its loss or its gradient is not finite.
        """
        if self._pending is None:
            return
        step, metrics, examples = self._pending
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._pending = None
        now = time.monotonic()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._first = self._seconds if self._first is None else self._first
        for name, words in WATCHED.items():
            if not math.isfinite(values[name]):
                raise UserError(
                    f"{words} is {values[name]} at step {step} ({_named(examples)}); the last checkpoint is from "
                    "before it: begin again in another --workdir with a lower optimizer.learning_rate or "
                    "optimizer.clip_norm (config.init_from takes this run's best checkpoint)"
                )
        self._window.append(values)
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if step % self._log_every == 0 or step == self._steps:
            self._write_window(step)

    def evaluated(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Writes the results of an evaluation after ``flush``; its time is not counted as time of the steps."""
        if self._writer:
            self._writer.scalars(step, metrics)
            self._writer.pictures(step, pictures)
        self._mark = time.monotonic()

    def _write_window(self, step: int) -> None:
        means = {name: float(np.mean([values[name] for values in self._window])) for name in self._window[-1]}
        steps, seconds = len(self._window), self._seconds
        if self._first and steps > 1:  # the pace leaves out compilation
            steps, seconds = steps - 1, seconds - self._first
        self._first = 0.0
        pace = steps / seconds
        means |= {
            "steps_per_second": pace,
            "tokens_per_second": pace * self._step_tokens,
            "memory_gib": peak_memory_gib(),
        }
        if self._writer:
            self._writer.scalars(step, means)
        self._window, self._seconds = [], 0.0


class MetricWriter:
    """Writes one run's scalars and sample images. A resumed run first deletes the lines of later steps."""

    def __init__(self, workdir: Path, step: int):
        """Opens the files to continue after ``step``; 0 = a new run."""
        self._pictures = folder_in(workdir, "pictures")
        path = workdir / "metrics.jsonl"
        _drop_lines_after(path, step)
        self._lines = path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoardFile(folder_in(workdir, "tensorboard"), step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one JSON line {"step": …, name: value}, and one TensorBoard point per name."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.add(step, summary=summary.scalar(name, value))
        self._tensorboard.flush()

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes each uint8 [H, W, 3] image as ``pictures/step_XXXXXX_name.png`` and to TensorBoard."""
        for name, picture in pictures.items():
            save(self._pictures / f"step_{step:06d}_{name}.png", picture)
            self._tensorboard.add(step, summary=summary.image(name, picture, dataformats="HWC"))
        self._tensorboard.flush()

    def close(self) -> None:
        self._lines.close()
        self._tensorboard.close()


def peak_memory_gib() -> float:
    """Returns the peak memory in GiB: of the fullest local device if JAX reports it, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [of_device["peak_bytes_in_use"] for of_device in stats if "peak_bytes_in_use" in of_device]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def training_minutes(workdir: Path, step: int) -> float:
    """Returns the minutes spent in steps up to this one, computed from ``metrics.jsonl``.

    Steps of all restarts count; evaluations and compilation do not.
    """
    seconds, before = 0.0, 0
    for _, values in _whole_lines(workdir / "metrics.jsonl"):
        pace = values.get("steps_per_second")
        if isinstance(pace, int | float) and pace > 0 and values["step"] <= step:
            seconds += (values["step"] - before) / pace
            before = values["step"]
    return seconds / 60


def _named(examples: Int[np.ndarray, " B"]) -> str:
    """Returns a text with the numbers of the first examples, such as ``examples 3, 77, …``."""
    shown = ", ".join(str(number) for number in examples[:SHOWN_EXAMPLES])
    return f"examples {shown}{', …' if len(examples) > SHOWN_EXAMPLES else ''}"


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the complete lines of a run's metrics, with their values.

    Lines that a kill has cut off or that are damaged are skipped.
    """
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if line.endswith("\n") and isinstance(values, dict) and type(values.get("step")) is int:
                yield line, values


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the complete lines of steps up to ``step``, and deletes all others."""
    if not path.exists():
        path.unlink(missing_ok=True)  # a dangling link, through which the file would be written elsewhere
        return
    kept = [line for line, values in _whole_lines(path) if values["step"] <= step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
