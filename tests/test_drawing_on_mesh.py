"""Windows, known codes and the guard against copies draw over a mesh what they draw on one device."""

import jax
import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.retrieval.patches import one_key_each
from arrag_jax.retrieval.sharded import shard_dense
from arrag_jax.retrieval.stored_codes import StoredCodes
from helpers import tiny

BATCH = 4
TWO, EIGHT = (2, 1), (4, 2)  # shapes of meshes
CASES = {
    "window": (EIGHT, {"window": 6}),
    "known codes": (TWO, {"known": True}),
    "guard": (TWO, {"max_copied_cells": 3, "stored": True}),
    "all": (EIGHT, {"window": 6, "known": True, "max_copied_cells": 3, "stored": True}),
}


@pytest.fixture(scope="module")
def model():
    return tiny.janus()


@pytest.fixture(scope="module")
def own(model):
    ids, mask = tiny.prompts((6, 3, 4, 5))
    return np.asarray(sample(model, ids, prompt_mask=mask, cfg_scale=2.0, seed=np.arange(BATCH)).codes)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_draws_what_one_device_draws(model, own, case):
    """Two devices draw plain; eight draw with a search that is split over two of them."""
    shape, more = CASES[case]
    ids, mask = tiny.prompts((6, 3, 4, 5))
    settings = {"prompt_mask": mask, "seed": np.arange(BATCH), "cfg_scale": 2.0, **more}
    if "stored" in settings:
        settings["stored"] = StoredCodes.of(own.reshape(BATCH, 4, 5), 9)
    if "known" in settings:
        settings["known"] = np.where(np.random.default_rng(0).random(own.shape) < 0.4, own, -1)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=auto, devices=jax.devices()[: int(np.prod(shape))])
    policy, alone, spread = Plain(), None, None
    if shape[1] > 1:
        policy, alone = Daid(0.5, 0.3), tiny.untied(model)
        keys, codes = np.asarray(alone.keys), np.asarray(alone.codes)
        spread = shard_dense(
            one_key_each(keys, codes), len(codes), np.asarray(model.codebook), alone.k, mesh, "fsdp", "data"
        )
    one = sample(model, ids, policy, alone, **settings)
    many = sample(model, ids, policy, spread, mesh=mesh, **settings)
    np.testing.assert_array_equal(many.codes, one.codes)
    np.testing.assert_array_equal(many.source, one.source)
    if case == "guard":
        assert (np.asarray(many.codes) != own).any()
