"""Distances between sets of features: golden numbers of the official programs, and laws."""

import itertools

import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics import cmmd, frechet_distance, fwd, kernel_distance, precision_recall
from arrag_jax.evaluation.metrics.frechet import Gaussian, distance, estimate
from arrag_jax.evaluation.metrics.kernels import cmmd_estimate, kid
from arrag_jax.evaluation.metrics.moments import LARGEST, Moments
from arrag_jax.evaluation.metrics.wavelets import hadamard, packets, step
from helpers.golden import benchmark


def normals(seed: int, count: int, width: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ (np.eye(width) + spread * rng.normal(size=(width, width)) / width)


def pixels(seed: int, count: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def summed(x: np.ndarray, step: float = 2.0**-18) -> Moments:
    moments = Moments.empty(x.shape[1], step)
    moments.add(x)
    return moments


def test_distances_are_those_of_the_official_programs():
    golden = np.load(benchmark("distances", "distances_golden.npz"))
    assert frechet_distance(golden["fid_a"], golden["fid_b"]) == pytest.approx(float(golden["fid"]), rel=1e-12)
    assert kernel_distance(golden["kid_a"], golden["kid_b"]) == pytest.approx(float(golden["kid"]), rel=1e-12)
    assert cmmd(golden["cmmd_a"], golden["cmmd_b"]) == pytest.approx(float(golden["cmmd"]), abs=1e-11)


def test_fwd_is_that_of_the_official_program():
    golden = np.load(benchmark("distances", "fwd_golden.npz"))
    assert fwd(golden["a"], golden["b"]) == pytest.approx(float(golden["fwd_level4"]), abs=1e-12)
    exact = summed(packets(golden["a"], 4, 0)[0], 1.0)
    order = np.arange(48).reshape(4, 4, 3).transpose(2, 0, 1).reshape(-1)  # channels come first there
    assert np.allclose(exact.mean[order] * step(4), golden["mu_a_packet0"], rtol=0, atol=1e-13)
    covariance = exact.covariance[np.ix_(order, order)] * step(4) ** 2
    assert np.allclose(covariance, golden["sigma_a_packet0"], rtol=0, atol=1e-12)


def test_the_distance_of_known_normals():
    """Of diagonal covariances it is the sum of (σ₁ − σ₂)²."""
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.0])
    first = Gaussian.of_covariance(np.zeros(3), np.diag(a**2))
    second = Gaussian.of_covariance(np.array([1.0, 0, 0]), np.diag(b**2))
    assert distance(first, second) == pytest.approx(1 + np.square(a - b).sum(), rel=1e-14)


@pytest.mark.parametrize("counts", [(60, 50), (20, 50), (50, 12), (9, 8)])
def test_the_distance_is_symmetric_and_does_not_change_in_a_wider_space(counts):
    """Zeros beside the features, or a rotation, change nothing, whether or not there are fewer images than features."""
    a, b = normals(0, counts[0], 24), normals(1, counts[1], 24) + 0.3
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(70, 70)))[0][:24]
    found = frechet_distance(a, b)
    assert found > 0
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-11)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(found, rel=1e-11)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)


def test_the_root_is_that_of_the_definition():
    """The trace of the root is the sum of the roots of the eigenvalues of the product."""
    a, b = normals(0, 90, 12), normals(1, 80, 12) + 1
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.cov(a.T).trace() + np.cov(b.T).trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_large_matrices_give_the_same(monkeypatch):
    a, b = normals(0, 90, 40), normals(1, 80, 40) + 1
    expected = frechet_distance(a, b)
    monkeypatch.setattr("arrag_jax.evaluation.metrics.frechet.LARGE", 10)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)


def test_kernel_distances_are_those_of_the_definition(monkeypatch):
    """With every pair written out, whatever the block; the last rows are not dropped."""
    a, b = normals(0, 13, 5), normals(1, 11, 5) + 0.2
    cubic = lambda x, y: (x @ y.T / 5 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
    expected = off(cubic(a, a)) + off(cubic(b, b)) - 2 * cubic(a, b).mean()
    gauss = lambda x, y: np.exp(-np.square(x[:, None] - y[None]).sum(-1) / 200)  # noqa: E731
    biased = 1000 * (gauss(a, a).mean() + gauss(b, b).mean() - 2 * gauss(a, b).mean())
    for block in (4, 2048):
        monkeypatch.setattr("arrag_jax.evaluation.metrics.kernels.BLOCK", block)
        assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
        assert cmmd(a, b) == pytest.approx(biased, rel=1e-10)


def test_precision_recall_density_and_coverage_are_those_of_the_definition(monkeypatch):
    drawn, true, k = normals(0, 23, 3), normals(1, 31, 3) + 0.5, 4
    apart = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)  # noqa: E731
    reach = lambda x: np.sort(apart(x, x), 1)[:, k]  # noqa: E731
    inside = apart(true, drawn) < reach(true)[:, None]
    expected = {
        "precision": inside.any(0).mean(),
        "recall": (apart(true, drawn) < reach(drawn)[None]).any(1).mean(),
        "density": inside.sum(0).mean() / k,
        "coverage": inside.any(1).mean(),
    }
    for block in (7, 2048):
        monkeypatch.setattr("arrag_jax.evaluation.metrics.manifold.BLOCK", block)
        found = precision_recall(drawn, true, k)._asdict()
        assert {name: figure.value for name, figure in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 2.0**-11])
def test_moments_are_the_same_in_any_order_and_in_any_parts(scale):
    """To the bit; a scale of 2^-11 takes features of one part, a scale of 1 those of two."""
    x = normals(0, 120, 9) * scale
    whole = summed(x)
    parts = [summed(x[part]) for part in (slice(0, 7), slice(7, 50), slice(50, 51), slice(51, 120))]
    for order in itertools.permutations(parts):
        a, b, c, d = order
        for merged in (((a + b) + c) + d, (a + b) + (c + d), a + (b + (c + d))):
            assert merged.count == 120
            assert np.array_equal(merged.mean, whole.mean) and np.array_equal(merged.covariance, whole.covariance)
    again = summed(np.random.default_rng(3).permutation(x))
    assert np.array_equal(again.products, whole.products) and np.array_equal(again.total, whole.total)


def test_moments_are_exact():
    """The integers are those of Python, up to the largest feature."""
    rows = np.random.default_rng(0).integers(-LARGEST + 1, LARGEST, (40, 4))
    found = summed(rows.astype(float), 1.0)
    exact = [[sum(int(r[i]) * int(r[j]) for r in rows) for j in range(4)] for i in range(4)]
    assert found.products.tolist() == exact
    assert found.total.tolist() == rows.sum(0).tolist()
    assert np.allclose(found.covariance, np.cov(rows.T), rtol=1e-12)


def test_moments_survive_a_file_and_give_the_distance_of_the_features(tmp_path):
    a, b = normals(0, 60, 9), normals(1, 50, 9) + 1
    summed(a).save(tmp_path / "a.npz")
    loaded = Moments.load(tmp_path / "a.npz")
    expected = frechet_distance(a, b)
    assert distance(loaded.gaussian(), summed(b).gaussian()) == pytest.approx(expected, rel=1e-6)
    with np.load(tmp_path / "a.npz") as file:
        assert np.allclose(file["mu"], a.mean(0), atol=1e-6) and np.allclose(file["sigma"], np.cov(a.T), atol=1e-5)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"b\.npz does not hold moments"):
        Moments.load(tmp_path / "b.npz")


def test_what_moments_refuse():
    with pytest.raises(UserError, match="not below"):
        summed(np.array([[9.0]]), 2.0**-18)
    with pytest.raises(UserError, match="not below"):
        summed(np.array([[np.nan]]))
    with pytest.raises(UserError, match="different features"):
        summed(normals(0, 3, 2)) + summed(normals(0, 3, 2), 1.0)
    with pytest.raises(UserError, match="at least two images"):
        summed(normals(0, 1, 2)).gaussian()


def tilted(x: np.ndarray, i: int, by: float) -> Gaussian:
    """The normal distribution of images of which one has ``by`` more weight."""
    weight = np.full(len(x), (1 - by) / len(x))
    weight[i] += by
    mean = weight @ x
    covariance = (x - mean).T @ ((x - mean) * weight[:, None]) * len(x) / (len(x) - 1)
    return Gaussian.of_covariance(mean, covariance, len(x))


@pytest.mark.parametrize("count", [80, 10])
def test_an_influence_is_a_derivative(count):
    """Of the distance with respect to an image's weight, by finite differences; with few images, along their space."""
    x, y = normals(0, count, 12), normals(1, 60, 12) + 0.4
    b = Gaussian.of_features(y)
    found = estimate(x, summed(x).gaussian(), b)
    assert found.value == pytest.approx(frechet_distance(x, y), rel=1e-6)
    for i in (0, 7):
        slope = (distance(tilted(x, i, 1e-5), b) - distance(tilted(x, i, -1e-5), b)) / 2e-5
        assert found.influence[i] == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("count", [80, 10])
def test_orthogonal_columns_change_no_distribution(count):
    """And give the influences of the exact moments."""
    x, y = normals(0, count, 12), normals(1, 60, 12) + 0.4
    whole, b = Gaussian.of_features(x), Gaussian.of_features(y)
    turned = whole.orthogonal()
    assert np.allclose(turned.factor @ turned.factor.T, whole.factor @ whole.factor.T, rtol=0, atol=1e-12)
    inner = turned.factor.T @ turned.factor
    assert np.allclose(inner, np.diag(np.diag(inner)), rtol=0, atol=1e-12) and len(inner) == min(count - 1, 12)
    exact = estimate(x, summed(x).gaussian(), b)
    assert np.allclose(estimate(x, turned, b).influence, exact.influence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("measure", ["fid", "kid", "cmmd"])
def test_an_interval_is_as_wide_as_samples_differ(measure):
    """The mean standard error is the spread over independent samples, within a quarter."""
    y = normals(99, 400, 6) + 0.5
    b, errors, values = Gaussian.of_features(y), [], []
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=(200, 6))
        if measure == "fid":
            found = estimate(x, summed(x).gaussian(), b)
        else:
            found = kid(x, y) if measure == "kid" else cmmd_estimate(x, y)
        errors.append(found.error)
        values.append(found.value)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_the_packets_of_a_haar_transform_keep_the_energy():
    """The transform is orthogonal; its first packet is the mean of each block, times the block's side."""
    images, level = pixels(0, 3, (16, 24)), 3
    found = np.stack([packets(images, level, row) for row in range(8)]) / 8  # [rows, P, N, D]
    assert np.square(found).sum((0, 1, 3)) == pytest.approx(np.square(images.astype(float)).sum((1, 2, 3)), rel=1e-6)
    means = images.reshape(3, 2, 8, 3, 8, 3).mean((2, 4)) * 8
    assert np.allclose(found[0, 0].reshape(3, 2, 3, 3), means, rtol=1e-6)
    assert np.array_equal(hadamard(2) @ hadamard(2).T, 4 * np.eye(4))


def test_fwd_by_one_level_is_that_of_the_definition():
    """Written out with sums and differences of neighbouring pixels."""
    a, b = pixels(0, 30, (4, 6)), pixels(1, 25, (4, 6)) // 2

    def split(images):
        x = images.astype(float) / 255
        low, high = (x[:, ::2] + x[:, 1::2], x[:, ::2] - x[:, 1::2])
        return [(y[:, :, ::2] + s * y[:, :, 1::2]).reshape(len(x), -1) / 2 for y in (low, high) for s in (1, -1)]

    expected = np.mean([frechet_distance(x, y) for x, y in zip(split(a), split(b), strict=True)])
    assert fwd(a, b, level=1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frechet_distance(np.zeros((5, 3)), np.zeros((5, 4))), "same network"),
        (lambda: frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))), "at least two images"),
        (lambda: cmmd(np.full((5, 3), np.nan), np.zeros((5, 3))), "a holds NaN"),
        (lambda: kernel_distance([["x"]], np.zeros((5, 3))), "a must be an array of numbers"),
        (lambda: fwd(pixels(0, 3, (16, 20)), pixels(0, 3, (16, 20))), "multiples of 16"),
        (lambda: fwd(pixels(0, 3, (16, 16)), pixels(0, 3, (32, 16))), "one size"),
        (lambda: fwd(np.zeros((3, 16, 16, 3)), pixels(0, 3, (16, 16))), "images_a must be uint8"),
        (lambda: fwd(pixels(0, 3, (16, 16)), pixels(0, 3, (16, 16)), level=0), "from 1 to 8"),
        (lambda: precision_recall(normals(0, 5, 2), normals(0, 9, 2)), "below the images of both sets"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
