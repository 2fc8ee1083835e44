"""Laws of the studio's tab Edit, without a page."""

import dataclasses

import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures.canvas import upscale
from arrag_jax.web.edit import EditAsk, edited, painted, shrunk
from helpers import drawings

PICTURE = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_a_picture_that_was_enlarged_for_the_page_is_as_it_was(scale):
    np.testing.assert_array_equal(shrunk(upscale(PICTURE, scale), (48, 48)), PICTURE)


def test_another_picture_is_scaled_and_cropped():
    assert shrunk(np.zeros((100, 333, 3), np.uint8), (48, 48)).shape == (48, 48, 3)
    assert shrunk(np.zeros((20, 21, 3), np.uint8), (48, 48)).shape == (48, 48, 3)


def test_what_any_layer_paints_is_the_mask():
    layers = [np.zeros((48, 48, 4), np.uint8) for _ in range(2)]
    layers[0][3, 4, 3], layers[1][5, 6] = 1, 255
    picture, mask = painted({"background": np.dstack([PICTURE, PICTURE[..., :1]]), "layers": layers})
    np.testing.assert_array_equal(picture, PICTURE)
    assert mask.sum() == 2 and mask[3, 4] and mask[5, 6]
    for nothing in (None, {"background": None, "layers": []}):
        with pytest.raises(UserError, match="there is no picture"):
            painted(nothing)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a" * 2000}, "2,000 characters, at most 1,000"),
        ({"variations": 5}, r"variations=5"),
        ({"seed": -1}, "seed=-1"),
        ({"mask": np.zeros((48, 48), bool)}, "nothing is painted over"),
    ],
)
def test_an_ask_has_limits(fields, message):
    with pytest.raises(UserError, match=message):
        EditAsk(**{"prompt": "a cat", "method": "caption", "seed": 0, "variations": 1, "picture": PICTURE, **fields})


@pytest.mark.long
@pytest.mark.slow
def test_what_is_not_painted_stays_and_a_side_grows(tmp_path_factory):
    config = drawings.make_config(tmp_path_factory)
    retrieval = dataclasses.replace(config.retrieval, search="dense")
    pipeline = open_pipeline(dataclasses.replace(config, retrieval=retrieval), ["plain", "caption"])
    mask = np.zeros((48, 48), bool)
    mask[20:30, 12:33] = True
    ask = EditAsk("a cat", "caption", 5, 2, PICTURE, mask)
    for pictures in edited(pipeline, ask):
        assert len(pictures) == 2 and (pictures[0] != pictures[1]).any()
        for picture in pictures:
            np.testing.assert_array_equal(picture[~mask], PICTURE[~mask])
            assert (picture[mask] != PICTURE[mask]).any()
    for pictures in edited(pipeline, dataclasses.replace(ask, mask=None, side=("up", 8))):
        assert pictures[0].shape == (56, 48, 3)
        np.testing.assert_array_equal(pictures[0][8:], PICTURE)
    for fields, message in (
        ({"method": "daid"}, "'daid' is not open here"),
        ({"mask": None, "side": ("east", 4)}, "side 'east' is unknown"),
        ({"mask": None, "side": ("up", 1000)}, "pixels=1000"),
        ({"mask": np.ones((48, 48), bool)}, "white in every position"),
        ({"prompt": ""}, "a prompt is empty"),
    ):
        with pytest.raises(UserError, match=message):
            edited(pipeline, dataclasses.replace(ask, **fields))
