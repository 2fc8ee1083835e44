"""Numbers that are no numbers are refused where they enter, in the API as in configs."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from arrag_jax import config
from arrag_jax.config import DaidConfig, DatastoreConfig, DrawConfig, NeighborsConfig, SamplingConfig, TrainConfig
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid
from arrag_jax.errors import UserError
from arrag_jax.fields import Settings, hints
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.parsing import parse
from arrag_jax.training.tasks import TASKS
from helpers import tiny


@dataclasses.dataclass(frozen=True)
class Numbers(Settings):
    """Settings outside of the package, whose types no test's hook checks."""

    scale: float | None
    number: int | None
    share: float


BASES = (TrainConfig, DrawConfig, DatastoreConfig, NeighborsConfig, *(options for _, options in TASKS.values()))
NO_NUMBERS = [float("nan"), float("inf"), -float("inf")]
GIVEN = {
    "task": "prior", "steps": 1, "batch_size": 1, "options": {}, "model": "m", "store": "s", "source": "s",
    "train_split": "train", "valid_split": "valid", "preset": "janus-emoji", "tokenizer": "t", "base": "b",
    "neighbors": "n",
}  # fmt: skip


def sections(cls: type) -> dict[str, type]:
    """A settings dataclass and all that stand in it, by name."""
    found = {cls.__name__: cls}
    for hint in hints(cls).values():
        if dataclasses.is_dataclass(hint):
            found |= sections(hint)
    return found


ALL = {name: cls for base in BASES for name, cls in sections(base).items()}


def good(cls: type) -> dict:
    """Values of the required fields."""
    required = [f for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    return {
        f.name: hints(cls)[f.name](**good(hints(cls)[f.name]))
        if dataclasses.is_dataclass(hints(cls)[f.name])
        else GIVEN[f.name]
        for f in required
    }


@pytest.mark.parametrize("name", ALL)
def test_no_field_of_any_settings_takes_them(name):
    cls, numbers = ALL[name], 0
    assert issubclass(cls, Settings)
    cls(**good(cls))
    for field in dataclasses.fields(cls):
        if {int, float} & {hints(cls)[field.name], *typing.get_args(hints(cls)[field.name])}:
            numbers += 1
            for value in NO_NUMBERS:
                given = (value,) if typing.get_origin(hints(cls)[field.name]) is tuple else value
                with pytest.raises((UserError, TypeCheckError)):  # the latter where tests alone check types
                    cls(**good(cls) | {field.name: given})
    assert numbers or cls in (config.DataSetConfig, config.ColumnsConfig)


@pytest.mark.parametrize("value", [np.nan, np.float32(np.inf), jnp.float32(jnp.nan), np.array(np.inf), jnp.inf, 1e39])
def test_the_api_takes_no_library_s_infinity(value):
    model, ids = tiny.janus(), np.array([[1, 2]])
    for name in ("cfg_scale", "temperature", "top_p"):
        with pytest.raises(UserError, match=name):
            sample(model, ids, **{name: value})
    for given in ({"weight": value, "temperature": 0.1}, {"weight": 0.1, "temperature": value}):
        with pytest.raises(UserError):
            Daid(**given)


@pytest.mark.parametrize("name", ["temperature", "tau"])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(name):
    with pytest.raises(UserError, match="too small"):
        SamplingConfig(temperature=1e-40) if name == "temperature" else DaidConfig(temperature=1e-40)


def test_settings_keep_python_s_numbers_whatever_library_they_came_from():
    made = Numbers(scale=np.float32(2), number=np.int64(3), share=jnp.float32(0.5))
    assert made == Numbers(2.0, 3, 0.5) and made == Numbers(2, np.uint8(3), np.array(0.5))
    assert [type(x) for x in dataclasses.astuple(made)] == [float, int, float]
    assert Numbers(None, None, 1).scale is None
    values = ("2", np.ones(2), True, [1], np.nan, np.float16(np.inf), jnp.nan)
    for bad in [*({"scale": x} for x in values), *({"number": x} for x in (*values, 2.5)), {"share": None}]:
        with pytest.raises(UserError, match=next(iter(bad))):
            Numbers(**{"scale": 1.0, "number": 1, "share": 1.0} | bad)


def test_an_override_of_nan_is_one_line_that_names_the_key():
    given = {"model": "m", "retrieval": {"store": "s"}, "sampling": {"cfg_scale": float("nan")}}
    with pytest.raises(UserError, match=r"config\.sampling.*cfg_scale"):
        parse(DrawConfig, given)


def test_a_policy_is_still_a_pytree_of_any_leaves():
    policy = Daid(0.1, 0.05, "sum")
    assert jax.tree.map(lambda x: x, policy) == policy
    gradient = jax.grad(lambda x: -x.weight - x.temperature)(Daid(jnp.float32(0.1), jnp.float32(0.05)))
    assert (gradient.weight, gradient.temperature) == (-1, -1)
    leaves, _ = jax.tree_util.tree_flatten_with_path(policy)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".weight", ".temperature"]
    assert Daid(jnp.array([0.1, 0.2]), jnp.array([0.1, 0.1])).weight.shape == (2,)
    with pytest.raises(UserError, match="λ"):
        Daid(jnp.array([0.1, 1.5]), 0.1)


@pytest.mark.parametrize(
    ("pixel", "message"),
    [
        (np.nan, "NaN"),
        (np.inf, "must be floats in"),
        (255.0, r"scale 0 … 255 by x / 127\.5 - 1"),
        (-1.1, "must be floats in"),
        (1.0011, "must be floats in"),
    ],
)
@pytest.mark.parametrize("library", [np, jnp])
def test_images_of_other_numbers_are_refused(library, pixel, message):
    model = tiny.janus()
    images = np.zeros((2, *model.image_size, 3), np.float32)
    images[1, -1, 0, 2] = pixel
    with pytest.raises(UserError, match=message):
        model.encode_images(library.asarray(images))


def test_rounding_of_pixels_is_no_fault():
    model = tiny.janus()
    model.encode_images(np.full((1, *model.image_size, 3), 1.0005, np.float32))


@pytest.mark.parametrize("mask", [[[1.0, np.nan]], [[1, 2]], [[0.5, 1]]])
def test_a_mask_holds_zeros_and_ones(mask):
    with pytest.raises(UserError, match="prompt_mask must hold 0 and 1"):
        sample(tiny.janus(), np.array([[1, 2]]), prompt_mask=np.array(mask))


@pytest.mark.parametrize("name", ["codes", "condition", "neighbor_codes"])
def test_codes_are_whole_numbers(name):
    blended = dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=1, hops=(1,), neighbors=2))
    model = tiny.janus(config=blended if name == "neighbor_codes" else tiny.CONFIG)
    positions = model.grid[0] * model.grid[1]
    given = {
        "condition": np.array([[1, 2]]),
        "codes": np.zeros((1, positions), int),
        "neighbor_codes": np.zeros((1, positions, 2), int) if name == "neighbor_codes" else None,
    }
    given[name] = np.full(given[name].shape, np.nan)
    said = "prompt_ids" if name == "condition" else name
    with pytest.raises(UserError, match=f"{said} must be integers"):
        model.score(**given)
