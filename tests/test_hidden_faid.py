"""Laws of FAiD whose neighbours are found by the states of the frozen base: drawing, looking up ahead, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.config import (
    DaidConfig,
    DrawConfig,
    GateConfig,
    HiddenConfig,
    MeshConfig,
    NeighborsConfig,
    RetrievalConfig,
    TrainConfig,
)
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.evaluation.run_record import method_facts
from arrag_jax.interfaces import BlendingBackbone, StatefulBackbone, WindowBackbone
from arrag_jax.mesh import make_mesh
from arrag_jax.models.checkpoint import load_model, load_prompts, save_model
from arrag_jax.models.lookup import LookupModel
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import project
from arrag_jax.ops.sampling import guide
from arrag_jax.retrieval import neighbor_sets
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.neighbor_set import NeighborSet
from arrag_jax.training.faid import FaidOptions, FaidTask
from helpers.drawings import MODEL
from helpers.hidden import IMAGES, K, opened, search_teacher_forced, store_in

pytestmark = pytest.mark.slow

BLENDED = 4
PROMPTS = ["a blue car", "a cat and a dog", "three frogs"]
SEEDS = np.arange(3)


@pytest.fixture(scope="module")
def base():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def tuned():
    """The base with random blenders, and other weights of attention than the base."""
    model = load_model(MODEL)
    model.add_adapters(LoraConfig(2, 4.0), FaidConfig(stride=3, hops=(1, 2), neighbors=BLENDED), nnx.Rngs(5))
    for layer in model.language_model.layers:
        b = layer.attention.q_lora.b.weight
        b[...] = 0.05 * jax.random.normal(jax.random.key(1), b.shape)
    model.merge_lora()
    return model


@pytest.fixture(scope="module")
def text():
    return load_prompts(MODEL)


@pytest.fixture(scope="module")
def store(base, tmp_path_factory) -> Datastore:
    return store_in(tmp_path_factory.mktemp("faid"), tmp_path_factory.getbasetemp() / "data", base)


def test_step_by_step_equals_teacher_forcing(store, base, tuned, text):
    """The base's states are searched, the tuned model blends what they find; windows give the same codes."""
    model, retriever, policy = LookupModel(tuned, base), opened(store, base), Faid(Daid(0.5, 0.02, "sum"))
    assert isinstance(model, BlendingBackbone) and isinstance(model, StatefulBackbone)
    assert isinstance(model, WindowBackbone)
    condition = base.check_condition(text(PROMPTS))
    arguments = (model, condition, policy, retriever)
    drawn = sample(*arguments, cfg_scale=1.5, seed=SEEDS, return_log_probs=True)
    codes = jnp.asarray(drawn.codes)
    found = search_teacher_forced(retriever, base.states(condition, codes), codes)
    neighbors = found.code[:, :BLENDED].reshape(*codes.shape, -1)
    both = (
        tuned.teacher_forced(condition, codes, neighbors),
        tuned.teacher_forced(tuned.unconditional(condition), codes),
    )
    log_p = jax.nn.log_softmax(guide(jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in both]), 1.5))
    expected = policy.log_probs(log_p, found, jnp.asarray(True)).reshape(drawn.log_probs.shape)
    np.testing.assert_allclose(np.exp(drawn.log_probs), np.exp(expected), atol=2e-4)
    assert np.abs(both[0] - tuned.teacher_forced(condition, codes)).max() > 0.1  # the blenders do something
    windows = sample(*arguments, cfg_scale=1.5, seed=SEEDS, window=16)
    np.testing.assert_array_equal(windows.codes, drawn.codes)


@pytest.mark.long
def test_a_mesh_draws_what_one_device_draws(store, base, tuned, text):
    mesh, model = make_mesh(MeshConfig(data=2, fsdp=4)), LookupModel(tuned, base)
    prompts, seeds = text([*PROMPTS, "a dog"]), np.arange(4)
    alone = sample(model, prompts, Faid(), opened(store, base), cfg_scale=1.5, seed=seeds)
    spread = sample(model, prompts, Faid(), opened(store, base, mesh=mesh), cfg_scale=1.5, seed=seeds, mesh=mesh)
    np.testing.assert_array_equal(alone.codes, spread.codes)


@pytest.fixture(scope="module")
def sets(store, tmp_path_factory):
    """Neighbours of scenes that the store holds and of others, found by states."""
    folder, data = tmp_path_factory.mktemp("sets"), str(tmp_path_factory.getbasetemp() / "data")
    retrieval = RetrievalConfig(str(store.directory), K, "hidden", "dense", "int8")
    config = NeighborsConfig(MODEL, retrieval, "store[:6]", "valid[:5]", "emoji_scenes/tiny", data, shard_size=4)
    neighbor_sets.build(config, folder)
    return {name: NeighborSet.open(folder / name) for name in ("train", "valid")}


def test_looking_up_ahead_finds_what_a_search_by_states_finds_in_other_images(store, base, text, sets):
    """Sets of codes are compared up to ties; the oracle compares every state with every stored key in float64."""
    table, records = np.asarray(store.table("hidden")), store.records("hidden")
    keys = HIDDEN.stored(records, table, np.arange(IMAGES * 144)).astype(np.float64)
    stored = store.codes.reshape(IMAGES, -1)
    for found in sets.values():
        assert found.settings.backbone == base.backbone_fingerprint
        for example in map(found.__getitem__, range(len(found))):
            states = base.states(base.check_condition(text([example["caption"]])), jnp.asarray(example["codes"][None]))[
                0
            ]
            query = project(table, np.asarray(states)).astype(np.float64)
            away = (query**2).sum(1)[:, None] + (keys**2).sum(1)[None] - 2 * query @ keys.T
            away[:, np.repeat((stored == example["codes"]).all(1), 144)] = np.inf
            farthest = np.sort(away, 1)[:, K - 1]
            for row, given in enumerate(example["neighbors"]):
                assert set(stored.reshape(-1)[away[row] < farthest[row] - 1e-4]) <= set(given)
                assert set(given) <= set(stored.reshape(-1)[away[row] < farthest[row] + 1e-4])


@pytest.mark.long
def test_methods_draw_with_the_base_beside_the_tuned_model(store, base, tuned, text, tmp_path):
    save_model(tuned, tmp_path)
    load_prompts(MODEL).save(tmp_path)
    gated = DaidConfig(0.9, 0.02, "sum", GateConfig(("prompt_excess",), (20.0,), (0.1,)))
    hidden = HiddenConfig(faid_model=str(tmp_path), k=K, search="dense", gated=gated)
    config = DrawConfig(MODEL, RetrievalConfig(str(store.directory)), hidden=hidden, batch_size=3)
    pipeline = open_pipeline(config, ("faid+hidden", "faid+gated"))
    retriever, model = opened(store, base), LookupModel(load_model(str(tmp_path)), base)
    for method in pipeline.methods:
        (batch,) = pipeline.draw(PROMPTS, method, SEEDS)
        policy = pipeline.policy(method, PROMPTS)
        assert (getattr(policy.mixture, "gate", None) is None) == (method == "faid+hidden")
        alone = sample(model, text(PROMPTS), policy, retriever, seed=SEEDS, **dataclasses.asdict(config.sampling))
        np.testing.assert_array_equal(batch.drawn.codes, alone.codes)
        np.testing.assert_array_equal(batch.drawn.weight, alone.weight)
        facts = method_facts(pipeline, method)  # a record names both models
        assert (facts["model"], facts["base"]) == (str(tmp_path), MODEL)
        assert facts["model_sha256"] != facts["base_sha256"]
    with pytest.raises(UserError, match=r"needs another model: give config\.hidden\.faid_model"):
        open_pipeline(dataclasses.replace(config, hidden=HiddenConfig()), ("faid+hidden",))


def options_of(sets, store, **changes) -> FaidOptions:
    search = {"keys": "hidden", "search": "dense", "storage": "int8"} | changes
    retrieval = RetrievalConfig(str(store.directory), K, **search)
    return FaidOptions(MODEL, str(sets["train"].directory.parent), retrieval, faid=FaidConfig(3, (1, 2), BLENDED))


def test_training_refuses_sample_grids_by_another_kind_of_key(sets, store):
    options = options_of(sets, store, keys="codebook", storage="codes")
    with pytest.raises(UserError, match="found by hidden keys, but sample grids search by codebook keys"):
        FaidTask(TrainConfig("faid", 1, 1, options), options)
