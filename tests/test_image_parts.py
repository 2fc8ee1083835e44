"""Laws of parts of given images: what is kept stays to the pixel, what a mask touches is drawn, windows join."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrag_jax.config import SamplingConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.parts import PartOf, fitted_mask, open_part, part_of
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import from_uint8, to_uint8
from helpers import drawings, running, tiny


@pytest.fixture(scope="module")
def model():
    return tiny.janus()  # a grid of 4 x 5, two pixels per position


def pixels(size=(8, 10), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def save(path: Path, array: np.ndarray) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def test_a_position_is_drawn_if_any_of_its_pixels_is_masked(model):
    mask = np.zeros((8, 10), bool)
    mask[3, 4] = mask[6, 9] = True
    part = part_of(model, pixels(), mask)
    whole = np.asarray(model.encode_images(from_uint8(pixels())[None])[0]).reshape(4, 5)
    drawn = np.zeros((4, 5), bool)
    drawn[1, 2] = drawn[3, 4] = True
    np.testing.assert_array_equal(part.codes, np.where(drawn, -1, whole))
    np.testing.assert_array_equal(part.kept, ~mask)
    assert part.windows((4, 5)) == [(0, 0)] and part.facts["drawn"].startswith("2 of 20 positions")


@pytest.mark.parametrize(("size", "factor"), [((8, 10), 1), ((48, 60), 6), ((48, 72), 6), ((4, 5), 1)])
def test_a_mask_is_scaled_as_its_image_is(size, factor):
    """Every masked pixel of the kept middle masks the pixel that it becomes, and no other."""
    rng = np.random.default_rng(0)
    mask = rng.random(size) < 0.02
    fitted = fitted_mask(mask, (8, 10))
    left = (size[1] - size[0] * 10 // 8) // 2
    middle = mask[:, left : left + size[0] * 10 // 8]
    blocks = middle.reshape(8, factor, 10, factor).any((1, 3)) if size[0] >= 8 else middle.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(fitted, blocks)


@pytest.mark.parametrize(
    ("side", "windows"),
    [
        (("right", 6), [(0, 2), (0, 3)]),
        (("left", 6), [(0, 1), (0, 0)]),
        (("down", 10), [(2, 0), (4, 0), (5, 0)]),
        (("up", 2), [(0, 0)]),
    ],
)
def test_windows_cover_what_a_picture_grows_by_and_each_keeps_half(model, side, windows):
    part = part_of(model, pixels(), side=side)
    assert part.windows((4, 5)) == windows
    known = part.codes >= 0
    assert known.sum() == 20 and part.kept.sum() == 80
    np.testing.assert_array_equal(part.pixels[part.kept].reshape(8, 10, 3), pixels())
    for top, left in windows:
        window = known[top : top + 4, left : left + 5]
        assert window.shape == (4, 5) and 0.4 <= window.mean() < 1
        known[top : top + 4, left : left + 5] = True
    assert known.all()


def test_bad_images_and_masks_are_named(model, tmp_path):
    image, black = save(tmp_path / "image.png", pixels()), np.zeros((8, 10), np.uint8)
    cases = {
        "is 10 x 7 pixels, .*image.png 10 x 8": {"mask": save(tmp_path / "other.png", black[:7])},
        "black all over, so nothing is drawn": {"mask": save(tmp_path / "black.png", black)},
        "white all over, so nothing is kept": {"mask": save(tmp_path / "white.png", black + 255)},
        "cannot be read: No such file": {"mask": str(tmp_path / "absent.png")},
        "give right:2 or right:4": {"extend": "right:3"},
        "at most down:2040": {"extend": "down:4000"},
    }
    spotted = black.copy()
    spotted[::2, ::2] = 255
    cases["white in every position"] = {"mask": save(tmp_path / "spotted.png", spotted)}
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message):
            open_part(PartOf(image, **flags), model)
    strip = save(tmp_path / "strip.png", pixels((8, 40)))
    with pytest.raises(UserError, match="40 x 8 pixels; 25% of it would be left"):
        open_part(PartOf(strip, extend="right:2"), model)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: not an image"):
        open_part(PartOf(str(tmp_path / "text.png"), strength=0.5), model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "needs one of --mask FILE, --extend SIDE:PIXELS or --strength SHARE; 0 are given"),
        ({"mask": "m.png", "strength": 0.5}, "2 are given"),
        ({"strength": 1.5}, "--strength=1.5 is outside"),
        ({"extend": "east:4"}, r"--extend=east:4 must be a side \(left, right, up, down\) and pixels"),
        ({"extend": "right"}, "and pixels: right:128"),
        ({"image": "", "mask": "m.png"}, "give it: --image FILE"),
    ],
)
def test_flags_that_do_not_fit_together_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        PartOf(**{"image": "image.png", **flags})


def test_a_picture_that_grows_is_not_guarded():
    part = PartOf("image.png", extend="right:4")
    part.require(SamplingConfig())
    PartOf("image.png", mask="m.png").require(SamplingConfig(max_copied_cells=3))
    with pytest.raises(UserError, match="max_copied_cells cannot guard it"):
        part.require(SamplingConfig(max_copied_cells=3))


@pytest.mark.long
@pytest.mark.slow
def test_generate_fills_extends_and_varies(tmp_path, tmp_path_factory, capsys, monkeypatch):
    """What is kept equals the image to the pixel; each variation draws otherwise; the files tell what was done."""
    store, model = drawings.make_store(tmp_path_factory), load_model(drawings.MODEL)
    photo = np.asarray(to_uint8(model.decode_codes(np.arange(144)[None] % 64, 12, 12)[0]))
    mask = np.zeros((48, 48), np.uint8)
    mask[13:30, 17:40] = 255
    image, white = save(tmp_path / "photo.png", photo), save(tmp_path / "mask.png", mask)
    common = (
        "--config=emoji_daid", f"--config.model={drawings.MODEL}", f"--config.retrieval.store={store}",
        "--config.mesh.data=1", "--prompt=a cat", "--scale=1", f"--image={image}",
    )  # fmt: skip

    def drawn(name, *flags):
        out = tmp_path / name
        done = running.run(capsys, monkeypatch, "generate", *common, f"--workdir={out}", *flags)
        assert done.code == 0, done
        return {path.stem: path for path in sorted(out.glob("[0-9]*.png"))}

    two_sided = "--config.retrieval.two_sided=True", "--config.daid.weight=0.5", "--method=plain,daid"
    filled = drawn("filled", f"--mask={white}", "--variations=2", *two_sided)
    assert list(filled) == ["00_daid", "00_plain", "01_daid", "01_plain"]
    results = {name: np.asarray(Image.open(path)) for name, path in filled.items()}
    for result in results.values():
        np.testing.assert_array_equal(result[mask == 0], photo[mask == 0])
        assert (result[mask > 0] != photo[mask > 0]).any()
    assert (results["00_daid"] != results["00_plain"]).any() and (results["00_plain"] != results["01_plain"]).any()
    told = json.loads(Image.open(filled["01_daid"]).text["provenance"])
    assert told["drawn"] == "30 of 144 positions, by the mask mask.png" and told["seed"] == "1"
    assert "as in the image" in told["kept_pixels"] and len(told["image_sha256"]) == 64
    for path in drawn("extended", "--extend=left:36", "--variations=2", "--method=plain").values():
        result = np.asarray(Image.open(path))
        assert result.shape == (48, 84, 3)
        np.testing.assert_array_equal(result[:, 36:], photo)
    varied = drawn("varied", "--strength=0.2", "--variations=2", "--method=plain")
    codes = np.asarray(model.encode_images(from_uint8(photo)[None])[0])
    same = np.asarray(to_uint8(model.decode_codes(codes, 12, 12)[0]))
    first, second = (np.asarray(Image.open(path)) for path in varied.values())
    assert (first != second).any() and (first != same).any()
    running.assert_one_line(
        running.run(capsys, monkeypatch, "generate", *common, f"--mask={white}", "--extend=up:4"), "2 are given"
    )
