"""The committed golden numbers are parts of the whole ones, and the weights' recipe gives the official weights."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import golden

FILES = sorted(
    path.relative_to(golden.HERE).as_posix()
    for path in golden.HERE.glob("*/*")
    if path.suffix in (".npz", ".safetensors")
)


def arrays(path) -> dict[str, np.ndarray]:
    return load_file(path) if path.suffix == ".safetensors" else dict(np.load(path))


def is_block(part: np.ndarray, whole: np.ndarray) -> bool:
    """Is the part what stands somewhere in the whole, without gaps?"""
    if part.dtype != whole.dtype or part.ndim != whole.ndim:
        return False
    places = itertools.product(*(range(b - a + 1) for a, b in zip(part.shape, whole.shape, strict=True)))
    blocks = (whole[tuple(slice(i, i + n) for i, n in zip(place, part.shape, strict=True))] for place in places)
    return any(np.array_equal(part, block) for block in blocks)


@pytest.mark.parametrize("name", FILES)
def test_what_is_committed_is_a_part_of_the_whole(name):
    family, _, file = name.partition("/")
    whole, part = arrays(golden.find(family, file, whole=True)), arrays(golden.HERE / name)
    assert part and [key for key, value in part.items() if not is_block(value, whole[key])] == []


@pytest.mark.parametrize("layout", ["janus_layout", "faid_layout"])
def test_the_recipe_gives_the_official_weights(tmp_path, layout):
    """Up to the last bit of numbers below 4."""
    official = golden.find("dev", layout, whole=True)
    made = golden.write_checkpoint(tmp_path / layout, layout == "faid_layout")
    ours, theirs = (
        {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
        for folder in (made, official)
    )
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=2.4e-7, err_msg=key)
