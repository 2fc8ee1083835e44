"""Fits the numbers of a gate on drawn images; the implementation of ``eval --fit_gate``.

A gate that is fitted to likelihoods is too soft for drawing, and a score alone can be bought by copying. So the gate of
``config.hidden.gated_caption`` is fitted to the benchmark's score of images, at a bound on the share of copies. One
number is changed at a time, by ``STEPS``; a change is kept if it is better. An interrupted fit continues after the
candidates that it has measured; ``gate.json`` holds the figures of all.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax import progress
from arrag_jax.config import DaidConfig, DrawConfig
from arrag_jax.decode.methods import BASELINE
from arrag_jax.errors import UserError
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.kept import Kept
from arrag_jax.evaluation.measure import by_group, scores
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.figures import grids
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import Benchmark

METHOD = "gated+caption"
SPLIT = "tuning"  # the split on whose prompts it is fitted
NEEDED = (BASELINE, METHOD)  # the methods that a pipeline must have
STEPS = (0.5, 2.0)  # factors of τ and of each threshold
MORE_COPIES = 0.03  # how much the share of copies of a group may exceed the baseline's
LESS_SCORE = 0.02  # how much the score of a group may fall below the baseline's
RECORD = "gate.json"


def fit_gate(config: DrawConfig, workdir: str, benchmark: str, num_prompts: int) -> None:
    """Fits the gate of ``config.hidden.gated_caption`` on prompts that no other measurement uses, and prints it.

    Raises:
      UserError: as ``fit``, or if the benchmark has no such prompts.
    """
    opened = open_benchmark(benchmark, config.data, SPLIT)
    pipeline = open_pipeline(config, NEEDED)
    require_writable(Path(workdir))
    print(fit(pipeline, opened, opened.prompts(num_prompts), Path(workdir)))


def fit(pipeline: Pipeline, benchmark: Benchmark, prompts: Sequence[str], out: Path) -> str:
    """Returns a table of all candidates, and the flags of the best one.

    The best candidate has the highest mean score over the groups of prompts, among those that keep the bounds
    ``MORE_COPIES`` and ``LESS_SCORE`` in every group; if none does, the one that exceeds them least.

    Raises:
      UserError: if the benchmark has no scores of single images, or the gate has no features.
    """
    start = pipeline.config.hidden.gated_caption
    if not any(benchmark.groups(len(prompts))):
        raise UserError("no prompt belongs to a group that eval measures; give more prompts (--num_prompts)")
    if not start.gate.features:
        raise UserError(
            "config.hidden.gated_caption.gate.features is empty; name the features whose gate is to be fitted"
        )
    kept = Kept(out)
    fitted = _Fit(pipeline, benchmark, prompts, kept)
    best = start
    with progress.bar(total=2 + len(STEPS) * (1 + len(start.gate.features)), desc="fitting", unit="gate") as bar:
        plain = fitted.figures(None)
        bar.update()
        if "score" not in plain:
            raise UserError("this benchmark scores no single image, so no gate can be fitted to it")
        worth = _worth(fitted.figures(best), plain)
        bar.update()
        for place in range(1 + len(start.gate.features)):
            for candidate in _changed(best, place):
                if (now := _worth(fitted.figures(candidate), plain)) > worth:
                    best, worth = candidate, now
                bar.update()
    write_json(out / RECORD, {"candidates": fitted.candidates})
    kept.forget()
    return f"{fitted.table()}\n\n{_flags(best)}"


class _Fit:
    """The figures of candidates; finished ones are kept in the folder of the fit."""

    def __init__(self, pipeline: Pipeline, benchmark: Benchmark, prompts: Sequence[str], kept: Kept):
        self._pipeline, self._benchmark, self._prompts, self._kept = pipeline, benchmark, prompts, kept
        groups = benchmark.groups(len(prompts))
        self._numbers = np.array([number for number, group in enumerate(groups) if group is not None], int)
        self._groups = [groups[number] for number in self._numbers.tolist()]
        self.candidates: list[dict[str, Any]] = []  # what ``gate.json`` holds

    def figures(self, candidate: DaidConfig | None) -> dict[str, Any]:
        """Returns "score" and "copied" by group; None = of the baseline."""
        method, config = (BASELINE, self._pipeline.config) if candidate is None else (METHOD, self._with(candidate))
        pipeline = dataclasses.replace(self._pipeline, config=config, methods=(method,))
        shown = scores(pipeline, self._benchmark, self._prompts, self._numbers, self._kept)
        figures: Any = by_group({}, shown, [], self._groups)[method]
        gated = None if candidate is None else dataclasses.asdict(candidate)
        self.candidates.append({"gated": gated, "figures": figures})
        return figures

    def _with(self, candidate: DaidConfig) -> Any:
        config = self._pipeline.config
        return dataclasses.replace(config, hidden=dataclasses.replace(config.hidden, gated_caption=candidate))

    def table(self) -> str:
        """Returns a Markdown table of all candidates."""
        rows, groups = [], list(self.candidates[0]["figures"]["score"])
        for row in self.candidates:
            gated = row["gated"]
            words = BASELINE
            if gated is not None:
                words = f"τ {gated['temperature']:g}, thresholds {list(gated['gate']['thresholds'])}"
            figures = row["figures"]
            rows.append([words, *(figures[name][group]["mean"] for name in ("score", "copied") for group in groups)])
        columns = [f"{name} {group}" for name in ("score", "copied") for group in groups]
        return grids.table(["gate", *columns], rows)


def _changed(config: DaidConfig, place: int) -> Iterator[DaidConfig]:
    """Yields settings with another τ (place 0) or threshold (place 1 and above)."""
    for factor in STEPS:
        if place == 0:
            yield dataclasses.replace(config, temperature=config.temperature * factor)
        else:
            thresholds = list(config.gate.thresholds)
            thresholds[place - 1] *= factor
            yield dataclasses.replace(config, gate=dataclasses.replace(config.gate, thresholds=tuple(thresholds)))


def _worth(figures: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float]:
    """Returns what makes a candidate better, most important first: minus the excess over the bounds, and the score."""
    beyond = 0.0
    for group in plain["score"]:
        copies = figures["copied"][group]["mean"] - plain["copied"][group]["mean"] - MORE_COPIES
        loss = plain["score"][group]["mean"] - figures["score"][group]["mean"] - LESS_SCORE
        beyond += max(copies, 0.0) + max(loss, 0.0)
    return -beyond, float(np.mean([row["mean"] for row in figures["score"].values()]))


def _flags(best: DaidConfig) -> str:
    thresholds, where = ",".join(f"{number:g}" for number in best.gate.thresholds), "--config.hidden.gated_caption"
    return f"{where}.temperature={best.temperature:g} {where}.gate.thresholds={thresholds}"
