"""Laws of fitting a gate: the best score within the bounds, each candidate drawn once, a stopped fit continues."""

import dataclasses
import json

import numpy as np
import pytest

from arrag_jax.config import DaidConfig, DrawConfig, GateConfig, HiddenConfig, MeshConfig, RetrievalConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import gate_fit
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.measure import Shown
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from helpers.drawings import MODEL

GATE = GateConfig(("prompt_excess", "caption"), (20.0, 5.0), (0.1, 0.4))


@pytest.fixture(scope="module")
def opened() -> Pipeline:
    """Without a store, because the figures are given."""
    hidden = HiddenConfig(gated_caption=DaidConfig(0.9, 0.04, "sum", GATE))
    return open_pipeline(DrawConfig(MODEL, RetrievalConfig(""), hidden=hidden, mesh=MeshConfig(1, 1)), ["plain"])


def fitted(opened, monkeypatch, tmp_path, score, copied) -> tuple[str, list[DaidConfig | None]]:
    """The result over figures that are functions of the candidate (None = plain), and what was measured."""
    measured, benchmark = [], open_benchmark("emoji_scenes", opened.config.data, gate_fit.SPLIT)
    prompts = benchmark.prompts(12)

    def scores(given, benchmark, prompts, numbers, kept):
        (method,), candidate = given.methods, given.config.hidden.gated_caption
        assert numbers.tolist() == [i for i, group in enumerate(benchmark.groups(12)) if group is not None]

        def make():
            measured.append(None if method == "plain" else candidate)
            return [score(measured[-1]), copied(measured[-1])]

        right, copies = kept.result([method, dataclasses.asdict(candidate)], make)
        return {method: Shown({}, *(np.full((1, len(numbers)), x) for x in (right, copies)))}

    monkeypatch.setattr(gate_fit, "scores", scores)
    return gate_fit.fit(opened, benchmark, prompts, tmp_path), measured


def test_the_best_score_within_the_bound_on_copies_is_found(opened, monkeypatch, tmp_path):
    """A smaller τ always scores better here, and copies more; the second threshold is best as it is."""
    score = lambda c: 0.3 if c is None else 0.8 - c.temperature - abs(c.gate.thresholds[1] - 0.4)  # noqa: E731
    copied = lambda c: 0.0 if c is None or c.temperature > 0.03 else 0.5  # noqa: E731
    printed, measured = fitted(opened, monkeypatch, tmp_path, score, copied)
    flags = "--config.hidden.gated_caption.temperature=0.04 --config.hidden.gated_caption.gate.thresholds=0.1,0.4"
    assert printed.splitlines()[-1] == flags
    assert len(measured) == len(set(map(repr, measured))) == 2 + 2 * 3
    freely, _ = fitted(opened, monkeypatch, tmp_path, score, lambda c: 0.0)
    assert freely.splitlines()[-1] == flags.replace("=0.04", "=0.02")
    record = json.loads((tmp_path / gate_fit.RECORD).read_text())["candidates"]
    assert [row["gated"] and row["gated"]["temperature"] for row in record][:4] == [None, 0.04, 0.02, 0.08]


def test_a_stopped_fit_measures_nothing_twice(opened, monkeypatch, tmp_path):
    def stopping(candidate):
        if candidate is not None and candidate.temperature == 0.08:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        fitted(opened, monkeypatch, tmp_path, stopping, lambda c: 0.0)
    _, measured = fitted(opened, monkeypatch, tmp_path, lambda c: 0.5, lambda c: 0.0)
    assert len(measured) == 5 and measured[0].temperature == 0.08
    assert [path.name for path in tmp_path.iterdir()] == [gate_fit.RECORD]


def test_a_gate_without_features_is_refused(opened, monkeypatch, tmp_path):
    config = dataclasses.replace(opened.config, hidden=HiddenConfig())
    with pytest.raises(UserError, match="features is empty"):
        fitted(dataclasses.replace(opened, config=config), monkeypatch, tmp_path, lambda c: 0.5, lambda c: 0.0)
