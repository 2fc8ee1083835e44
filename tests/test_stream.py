"""Laws of drawing row by row: the rows are the drawing, and a drawing that stops leaves nothing behind."""

import jax
import numpy as np
import pytest

from arrag_jax.decode import loop
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.decode.stream import BLANK, joined, partial_images, sample_stream
from arrag_jax.errors import UserError
from arrag_jax.nn.vq import to_uint8
from helpers import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.janus()


@pytest.fixture(scope="module")
def retriever(model):
    return tiny.store(model)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Plain(), Daid(0.4, 0.3)], ids=["plain", "daid"])
def test_the_rows_are_what_sample_returns(model, retriever, policy):
    ids, mask = tiny.prompts((3, 6))
    what = {"prompt_mask": mask, "seed": np.array([4, 9]), "top_p": 0.9, "return_log_probs": True}
    loop._advance.clear_cache()
    whole = loop.sample(model, ids, policy, retriever, **what)
    rows = list(sample_stream(model, ids, policy, retriever, **what))
    assert [row.codes.shape for row in rows] == [(2, 5)] * 4
    for ours, expected in zip(joined(rows), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert loop._advance._cache_size() == 1  # one program draws whole grids and rows


@pytest.mark.slow
def test_other_numbers_need_no_other_program(model):
    ids, mask = tiny.prompts((3, 6))
    loop._advance.clear_cache()
    drawn = [
        np.asarray(
            loop.sample(model, ids, prompt_mask=mask, cfg_scale=scale, temperature=temperature, top_p=top_p).codes
        )
        for scale, temperature, top_p in ((2.0, 1.0, 0.9), (7.5, 1.0, 0.9), (2.0, 0.3, 0.9), (2.0, 1.0, 0.2))
    ]
    assert loop._advance._cache_size() == 1
    assert len({codes.tobytes() for codes in drawn}) == 4


@pytest.mark.slow
def test_a_drawing_that_stops_changes_none_that_follows(model, retriever):
    ids, mask = tiny.prompts((3, 6))

    def stream():
        return sample_stream(model, ids, Daid(0.4, 0.3), retriever, prompt_mask=mask, seed=2)

    whole = [row.codes for row in stream()]
    first, second = stream(), stream()
    began = [next(first).codes, next(second).codes, next(first).codes]
    first.close()
    kept = [next(second).codes for _ in range(3)]
    for row, (ours, number) in enumerate(zip([*began, *kept], (0, 0, 1, 1, 2, 3), strict=True)):
        np.testing.assert_array_equal(ours, whole[number], err_msg=f"row {row}")
    with pytest.raises(StopIteration):
        next(second)


@pytest.mark.slow
def test_a_stream_over_a_mesh_gives_the_rows_of_one_device(model):
    ids, mask = tiny.prompts((4,) * 8)
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    alone = loop.sample(model, ids, prompt_mask=mask)
    rows = joined(list(sample_stream(model, ids, prompt_mask=mask, mesh=mesh)))
    np.testing.assert_array_equal(alone.codes, rows.codes)


def test_arguments_are_checked_before_the_first_row(model):
    with pytest.raises(UserError, match="top_k = 10 is more than the 9 codes"):
        sample_stream(model, tiny.prompts((3,))[0], top_k=10)


@pytest.mark.slow
def test_a_partial_picture_is_grey_below_and_the_whole_one_is_the_image(model):
    codes = loop.sample(model, tiny.prompts((3, 3))[0]).codes
    whole = np.asarray(to_uint8(model.decode_codes(codes, *model.grid)))
    np.testing.assert_array_equal(partial_images(model, np.asarray(codes)), whole)
    part = partial_images(model, np.asarray(codes)[:, :10])
    half = whole.shape[1] // 2
    assert part.shape == whole.shape and np.all(part[:, half:] == BLANK) and np.any(part[:, :half] != BLANK)
