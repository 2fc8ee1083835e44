"""Laws of intervals over prompts: exact means, known coverage, paired resamples."""

import numpy as np
import pytest

from arrag_jax.evaluation.intervals import bootstrap, resampled_means
from arrag_jax.evaluation.measurements import figure_of


def test_the_interval_of_coins_is_that_of_the_central_limit():
    values = np.random.default_rng(0).binomial(1, 0.3, (1, 400)).astype(float)
    mean, low, high = bootstrap(values)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert mean == values.mean()
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.12), pytest.approx(half, rel=0.12))
    assert bootstrap(values) == (mean, low, high)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    samples = np.random.default_rng(0).random((300, 1, 60)) < 0.3
    held = [low <= 0.3 <= high for _, low, high in (bootstrap(x.astype(float), resamples=400) for x in samples)]
    assert 0.90 < np.mean(held) < 0.98


def test_copies_of_one_prompt_do_not_narrow_the_interval():
    values = np.random.default_rng(1).normal(size=(1, 50))
    np.testing.assert_allclose(bootstrap(np.repeat(values, 9, 0)), bootstrap(values))


def test_every_resample_is_a_weighted_mean_of_prompts():
    values, weights = np.array([1.0, 0.0, 4.0]), np.array([1.0, 2.0, 3.0])
    means = resampled_means(values, weights, resamples=5000)
    assert set(np.round(np.unique(means), 6)) == {
        round(sum(x * values * weights) / sum(x * weights), 6)
        for x in np.array([(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)])
    }
    assert resampled_means(values, np.zeros(3)).shape == (2000,)


def test_blocks_of_resamples_do_not_change_their_number(monkeypatch):
    monkeypatch.setattr("arrag_jax.evaluation.intervals.BLOCK", 7)
    assert resampled_means(np.ones(3), np.ones(3), resamples=11).shape == (11,)


def test_a_figure_is_the_unweighted_mean_of_its_parts():
    values = {"a": {"x": (1.0, 1.0), "y": (0.0, 1.0)}, "b": {"z": (1.0, 2.0), "w": (0.0, 6.0)}}
    figure = figure_of(values, ("a", "b"), 100.0)
    assert figure.value == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert figure.low <= figure.value <= figure.high
    assert figure_of(values, ("a", "c")).value is None
