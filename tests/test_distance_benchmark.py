"""The benchmark of distances: folders, tars and statistics; killed and continued; what is refused.

A random projection of the scaled pixels stands in for the FID network; test_inception.py holds the network itself.
"""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from arrag_jax import eval
from arrag_jax.errors import UserError
from arrag_jax.evaluation import benchmarks, feature_store, measurements
from arrag_jax.evaluation.distances import benchmark, packets
from arrag_jax.evaluation.metrics import frechet, frechet_distance, fwd, kernel_distance, wavelets
from arrag_jax.evaluation.metrics.features import Extractor
from arrag_jax.evaluation.metrics.resizing import require_rule, resized
from arrag_jax.interfaces import FolderBenchmark

WIDTH, SIDE, SIZE = 12, 16, (8, 16)
PROJECTION = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, WIDTH)).astype(np.float32) / SIDE


def extractor(resize="clean", weights=None) -> Extractor:
    return Extractor(
        f"stand-in, resize {require_rule(resize)}",
        WIDTH,
        lambda image: resized(image, resize, SIDE),
        lambda batch: batch.reshape(len(batch), -1) @ PROJECTION,
    )


def features(images) -> np.ndarray:
    return np.stack([resized(image, "clean", SIDE).reshape(-1) for image in images]) @ PROJECTION


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8) // (1 + seed)


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Scores 20 drawn images against 30 true ones of two categories; returns the record."""
    monkeypatch.setattr(benchmark, "inception_extractor", extractor)
    monkeypatch.setattr(feature_store, "SHARD", 8)
    drawn, true = images(0, 20), images(1, 30)
    prompts = {f"{i:03d}": {"prompt": f"prompt {i}", "category": "ab"[i % 2]} for i in range(20)}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "out").mkdir()
    for i, image in enumerate(drawn):
        (tmp_path / "out" / f"{i:03d}.png").write_bytes(png(image))
    for i, image in enumerate(true):
        folder = tmp_path / "true" / "ab"[i // 15]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png(image))

    def score(out="out", **flags):
        flags = {"reference": str(tmp_path / "true"), "features": str(tmp_path / "features"), "fwd_level": 2, **flags}
        eval.run(
            None, str(tmp_path / out), "distances", "test", 600, 1500, False, False,
            prompts=str(tmp_path / "prompts.json"), score_only=True, **flags,
        )  # fmt: skip
        return measurements.read_results(str(tmp_path / out))

    return score


def values(record) -> dict[str, float]:
    return {name: figure["value"] for name, figure in record["figures"].items()}


def test_it_is_a_benchmark():
    assert isinstance(benchmark.Distances([]), FolderBenchmark)
    assert set(benchmarks.benchmark_flags()) >= set(benchmark.Distances.flags)


def test_figures_are_those_of_the_python_functions(run, capsys):
    """To the rounding of features to float32, which depends on the batch."""
    found, (a, b) = values(run()), (features(images(0, 20)), features(images(1, 30)))
    assert found["FID, clean"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert found["KID, clean"] == pytest.approx(kernel_distance(a, b), rel=1e-6)
    assert found["FWD"] == pytest.approx(fwd(images(0, 20), images(1, 30), 2), rel=1e-9)
    assert found["FID, clean, a"] == pytest.approx(frechet_distance(a[::2], b[:15]), rel=1e-6)
    assert found["FID, clean, b"] == pytest.approx(frechet_distance(a[1::2], b[15:]), rel=1e-6)
    said = capsys.readouterr().out
    assert "note: FID and KID are of the resize 'clean'" in said and "rank-deficient" not in said


def test_the_value_is_the_mean_over_prompts_and_lies_in_its_interval(run):
    record = run()
    for name in ("FID, clean", "KID, clean", "FWD", "FID, clean, a", "FID, clean, b"):
        figure = record["figures"][name]
        assert figure["low"] < figure["value"] < figure["high"]
        assert np.mean([value for value, _ in record["values"][name].values()]) == pytest.approx(figure["value"])


def test_fwd_has_the_influences_of_its_packets(run):
    """The value of a prompt is the distance plus the mean over packets of its influence on each."""
    found, level = run()["values"]["FWD"], 2
    expected = []
    for row in range(2**level):
        both = (wavelets.packets(images(*of), level, row) * wavelets.step(level) for of in ((0, 20), (1, 30)))
        for x, y in zip(*(each.astype(np.float64) for each in both), strict=True):
            a, b = (frechet.Gaussian.of_features(each) for each in (x, y))
            found_alone = frechet.estimate(x, a.orthogonal(), b)
            expected.append(found_alone.value + found_alone.influence)
    assert [value for value, _ in found.values()] == pytest.approx(np.mean(expected, 0), rel=1e-6)


@pytest.mark.slow
def test_two_runs_are_compared_prompt_by_prompt(run, tmp_path, capsys):
    """Equal images but for one: the difference is far smaller than the intervals of both, and is seen."""
    (tmp_path / "other").mkdir()
    for i, image in enumerate(images(0, 20)):
        (tmp_path / "other" / f"{i:03d}.png").write_bytes(png(image // 4 * 3))
    run(), run(out="other")
    capsys.readouterr()
    print(measurements.compare(str(tmp_path / "out"), str(tmp_path / "other")))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| FID, clean "))
    assert row.rstrip("| ").endswith("yes")


def test_a_tar_and_statistics_are_references_too(run, tmp_path):
    whole = values(run(fwd_level=0))
    with tarfile.open(tmp_path / "true.tar", "w") as tar:
        tar.add(tmp_path / "true", "true")
    assert values(run(reference=str(tmp_path / "true.tar"), fwd_level=0)) == whole
    b = features(images(1, 30))
    np.savez(tmp_path / "true.npz", mu=b.mean(0), sigma=np.cov(b.T))
    found = values(run(reference=str(tmp_path / "true.npz")))
    assert list(found) == ["FID, clean"]
    assert found["FID, clean"] == pytest.approx(whole["FID, clean"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_continues_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    run()
    whole = (tmp_path / "out" / "results.json").read_bytes()
    calls, left = [0], [0]

    def cut(resize="clean", weights=None):
        def embed(batch):
            calls[0] += 1
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return extractor().embed(batch)

        return extractor()._replace(embed=embed)

    monkeypatch.setattr(benchmark, "inception_extractor", cut)
    for stop in (0, 1, 2, 1, 99):
        left[0] = stop
        try:
            run(features=str(tmp_path / "again"))
        except KeyboardInterrupt:
            assert stop < 99
    assert (tmp_path / "out" / "results.json").read_bytes() == whole
    assert calls[0] == 3 + 4 + 4  # every shard once, and once for each kill
    calls[0] = 0
    run(features=str(tmp_path / "again"))
    assert calls[0] == 0


@pytest.mark.slow
def test_damaged_features_are_computed_again_and_changed_images_are_seen(run, tmp_path):
    first = run()
    for path in (tmp_path / "features").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    assert run()["figures"] == first["figures"]
    (tmp_path / "out" / "003.png").write_bytes(png(images(0, 20)[5]))
    assert values(run())["FID, clean"] != values(first)["FID, clean"]


@pytest.mark.slow
def test_few_packets_at_a_time_give_the_same(run, tmp_path, monkeypatch):
    """Also if the run is killed between them; what is kept is not computed again."""
    whole = values(run())["FWD"]
    monkeypatch.setattr(packets, "MEMORY", 1)
    monkeypatch.setattr(packets, "BLOCK", 7)
    real, calls = packets.estimates, []

    def cut(*words):
        calls.append(words[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(packets, "estimates", cut)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert values(run())["FWD"] == pytest.approx(whole, rel=1e-12)  # influences are summed in another order
    assert [row[0] for row in calls] == [0, 1, 2, 2, 3]


def test_true_images_of_another_size_are_scaled(run, tmp_path):
    for path in (tmp_path / "true").rglob("*.png"):
        image = Image.open(path)
        image.resize((32, 16), Image.Resampling.NEAREST).save(path)
    assert values(run())["FWD"] > 0


def test_few_images_are_noted(run, capsys, monkeypatch):
    run()
    assert "rank-deficient" not in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "inception_extractor", wider)
    run()
    assert "20 images are no more than the 24 features" in capsys.readouterr().out


def wider(resize="clean", weights=None) -> Extractor:
    """Twice as many features."""
    half = extractor()
    return half._replace(name="wider", width=2 * WIDTH, embed=lambda x: np.hstack([half.embed(x), half.embed(x) ** 2]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"reference": ""}, "--reference"),
        ({"reference": "absent"}, "--reference=.*absent does not exist"),
        ({"resize": "bicubic"}, "resize='bicubic' is unknown"),
        ({"fwd_level": 9}, "--fwd_level=9 must be from 0 to 8"),
        ({"fwd_level": 5}, "multiples of 32, not 8 x 16"),
    ],
)
def test_bad_flags_are_named(run, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(**flags)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("kind", ["truncated", "keys", "shape", "asymmetric"])
def test_bad_statistics_are_named(run, tmp_path, kind):
    path, b = tmp_path / "true.npz", features(images(1, 30))
    mu, sigma = b.mean(0), np.cov(b.T)
    if kind == "keys":
        np.savez(path, mu=mu)
    elif kind == "shape":
        np.savez(path, mu=mu[:-1], sigma=sigma)
    else:
        np.savez(path, mu=mu, sigma=sigma if kind == "truncated" else np.triu(sigma))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    words = {"truncated": "is no whole .npz", "keys": "holds no 'sigma", "shape": r"holds mu \[11\]"}
    with pytest.raises(UserError, match=words.get(kind, "not symmetric")):
        run(reference=str(path))


def test_bad_images_are_named(run, tmp_path):
    whole = (tmp_path / "true" / "a" / "004.png").read_bytes()
    (tmp_path / "true" / "a" / "004.png").write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"a/004\.png: .*mend it, or take it out"):
        run()
    (tmp_path / "true" / "a" / "004.png").write_bytes(whole)
    (tmp_path / "out" / "002.png").write_bytes(png(images(0, 1)[0][:, :8]))
    made = sorted((tmp_path / "features").rglob("*"))
    with pytest.raises(UserError, match=r"002\.png has 8 x 8 pixels, 000\.png 8 x 16; FWD needs one size"):
        run()
    assert sorted((tmp_path / "features").rglob("*")) == made  # it is seen before the networks run
    assert "FWD" not in values(run(fwd_level=0))
