"""Laws of hidden keys: building, searching and drawing by the states of the embedded backbone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.config import (
    DaidConfig,
    DrawConfig,
    GateConfig,
    HiddenConfig,
    MeshConfig,
    RetrievalConfig,
)
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation.likelihood import bits_of_codes, look_up, score_scenes
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.evaluation.trust import Trust
from arrag_jax.mesh import make_mesh
from arrag_jax.models.checkpoint import load_model, load_prompts
from arrag_jax.ops.distances import host_distances
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import SURPRISE_STEP
from arrag_jax.ops.sampling import guide
from arrag_jax.retrieval import build
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import folder_of
from arrag_jax.store.hidden_building import Reader, add_hidden, prompts_of
from helpers.drawings import MODEL
from helpers.hidden import IMAGES, K, opened, search_teacher_forced, store_in

GATE = GateConfig(("surprise", "prompt_excess"), (6.0, 20.0), (0.7, 0.1), images=4)
PROMPTS = ["a blue car", "a cat and a dog", "three frogs"]


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def text():
    return load_prompts(MODEL)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> Datastore:
    return store_in(tmp_path_factory.mktemp("hidden"), tmp_path_factory.getbasetemp() / "data", model)


def states_of(model, text, numbers):
    """States of validation scenes, of which the store holds none: [n, D]."""
    examples = [scene("valid", i) for i in numbers]
    codes = model.encode_images(jnp.asarray(np.stack([render(s) for s in examples]) / 127.5 - 1, jnp.float32))[0]
    known = next(Reader(model, text, prompts_of(text, [s.caption for s in examples]), len(examples)).read(
        np.asarray(codes), [s.caption for s in examples]
    ))  # fmt: skip
    return known.states.reshape(-1, known.states.shape[2])


def nowhere(states):
    """Before the first code of a picture, for each state."""
    return jnp.full((len(states), 144), -1), jnp.zeros(len(states), jnp.int32)


@pytest.mark.slow
def test_a_report_measures_the_index_and_counts_images_by_their_excess(store, capsys):
    """The index of few keys is exact. Its queries are not stored keys."""
    build.report(store.directory)
    told = capsys.readouterr().out
    figures = json.loads((store.directory / "report-hidden.json").read_text())
    assert figures["recall_at_10"] == figures["recall_at_2048"] == 1 and figures["num_patches"] == IMAGES * 144
    bits = np.concatenate([folder.told().mean_excess * 144 for folder in store.hidden])
    up_to = [int((bits <= limit).sum()) for limit in (0, 5, 20, 100)]
    counts = zip(("up to 0", "up to 5", "up to 20", "up to 100", "more"), np.diff([0, *up_to, IMAGES]), strict=True)
    shown = ", ".join(f"{name}: {count}" for name, count in counts)
    assert f"images of emoji_scenes/tiny/store by their excess in bits: {shown}\n" in told
    assert "index over hidden keys" in told and "index over codebook keys" in told


@pytest.mark.slow
def test_every_search_finds_the_nearest_keys(store, model, text):
    """Also sharded over a mesh. The oracle compares every stored key in exact distances."""
    states = jnp.asarray(states_of(model, text, range(3)))
    dense = jax.tree.map(np.asarray, opened(store, model).search_states(states, *nowhere(states)))
    keys = HIDDEN.stored(store.records("hidden"), store.table("hidden"), np.arange(store.num_rows("hidden")))
    query = np.asarray(opened(store, model).table)
    query = np.clip(np.asarray(states @ query[:-2]) + query[-2], -1, 1)
    distance = host_distances(query, np.broadcast_to(keys, (len(query), *keys.shape)))
    np.testing.assert_allclose(dense.distance, np.sort(distance, 1)[:, :K], atol=1e-5)
    np.testing.assert_array_equal(dense.code, store.codes.reshape(-1)[dense.id])
    held = opened(store, model).local
    assert held.keys.nbytes + held.codes.nbytes == store.num_rows("hidden") * (32 + 4)  # docs/keys.md
    mesh = make_mesh(MeshConfig(4, 1))
    for other in (
        opened(store, model, storage="float32"),
        opened(store, model, "scann"),
        opened(store, model, mesh=mesh),
    ):
        found = jax.tree.map(np.asarray, other.search_states(states, *nowhere(states)))
        np.testing.assert_array_equal(found.distance, dense.distance)
        np.testing.assert_array_equal(found.code, dense.code)


@pytest.mark.slow
def test_step_by_step_equals_teacher_forcing(store, model, text):
    retriever, policy = opened(store, model), Daid(0.6, 0.02, "sum", Trust(store).gate(GATE, PROMPTS))
    condition = model.check_condition(text(PROMPTS))
    drawn = sample(model, condition, policy, retriever, cfg_scale=1.5, seed=np.arange(3), return_log_probs=True)
    codes = jnp.asarray(drawn.codes)
    states = model.states(condition, codes)
    other = model.states(model.unconditional(condition), codes)
    flat = [model.logits(x).reshape(-1, 512) for x in (states, other)]
    log_p = jax.nn.log_softmax(guide(jnp.concatenate(flat), 1.5))
    found = search_teacher_forced(retriever, states, codes)
    expected = policy.log_probs(log_p, found, jnp.asarray(True)).reshape(drawn.log_probs.shape)
    np.testing.assert_allclose(np.exp(drawn.log_probs), np.exp(expected), atol=2e-4)
    parallel = sample(model, condition, policy, retriever, cfg_scale=1.5, seed=np.arange(3), window=16)
    np.testing.assert_array_equal(parallel.codes, drawn.codes)
    weight = policy.weights(log_p, found, jnp.asarray(True)).reshape(drawn.weight.shape)
    np.testing.assert_allclose(drawn.weight, weight, atol=2e-3)


@pytest.mark.slow
def test_weight_zero_and_a_closed_gate_draw_what_plain_draws(store, model, text):
    closed = dataclasses.replace(GATE, thresholds=(100.0, 0.1))
    condition = text(PROMPTS)
    plain = sample(model, condition, cfg_scale=1.5, seed=np.arange(3), return_log_probs=True)
    for policy in (Daid(0.0, 0.02, "sum"), Daid(0.99, 0.02, "sum", Trust(store).gate(closed, PROMPTS))):
        drawn = sample(
            model, condition, policy, opened(store, model), cfg_scale=1.5, seed=np.arange(3), return_log_probs=True
        )
        np.testing.assert_array_equal(drawn.codes, plain.codes)
        np.testing.assert_array_equal(drawn.log_probs, plain.log_probs)
        assert not np.asarray(drawn.weight).any()


@pytest.mark.slow
def test_surprises_are_the_likelihood_that_eval_reports(store, model, text):
    told = HIDDEN.told(store.records("hidden"), store.table("hidden").shape[1])
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("store", i) for i in range(IMAGES))]
    scored = score_scenes(model, look_up(model, text, examples, None))
    bits = np.concatenate(bits_of_codes(scored, Plain())).reshape(IMAGES, -1)
    np.testing.assert_allclose(told.mean_surprise, bits.mean(1), atol=1e-4)
    np.testing.assert_allclose(told.surprise * SURPRISE_STEP, np.minimum(bits, 255 / 16), atol=1 / 32 + 1e-3)


@pytest.mark.slow
def test_codes_that_the_model_drew_itself_have_no_excess(model, text):
    captions = [scene("valid", i).caption for i in range(48)]
    drawn = sample(model, text(captions), cfg_scale=None, seed=np.arange(48))
    excess = next(
        Reader(model, text, prompts_of(text, captions), 48).read(np.asarray(drawn.codes), captions)
    ).excess.mean(1)
    assert abs(excess.mean()) < 4 * excess.std() / 48**0.5


@pytest.mark.slow
def test_a_build_in_two_pieces_writes_the_same_bytes(store, model, text, tmp_path):
    shutil.copytree(store.directory, tmp_path / "store")
    again = dataclasses.replace(store, directory=tmp_path / "store")
    folder = folder_of(again.directory, model.backbone_fingerprint)
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    for name in ("manifest.json", "hidden-00001-of-00003.arrayrecord"):
        (folder / name).unlink()
    added = add_hidden(Datastore.open(again.directory), model, text, 5, 8, MODEL)  # the projection stays
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")} == whole
    added.verify()
    shutil.rmtree(folder)
    add_hidden(Datastore.open(again.directory), model, text, 32, 8, MODEL)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")} == whole


def test_keys_of_another_backbone_are_refused(store, model):
    with pytest.raises(UserError, match=f"hidden keys of backbone {model.backbone_fingerprint} alone.*--config.keys="):
        dataclasses.replace(store, backbone="0" * 16).require_kind("hidden")


@pytest.mark.slow
def test_methods_draw_and_a_gate_is_recorded(store):
    gated = DaidConfig(0.99, 0.02, "sum", GATE)
    hidden = HiddenConfig(k=K, search="dense", daid=DaidConfig(0.9, 0.02, "sum"), gated=gated)
    retrieval = RetrievalConfig(str(store.directory))
    config = DrawConfig(MODEL, retrieval, hidden=hidden, batch_size=2, mesh=MeshConfig(1, 1))
    pipeline = open_pipeline(config, ["hidden", "gated", "gated+caption"])
    for method in pipeline.methods:
        batches = list(pipeline.draw(PROMPTS, method, np.arange(3)))
        weight = np.concatenate([batch.drawn.weight for batch in batches])
        assert (weight == np.float32(0.9)).all() if method == "hidden" else (weight < 0.99).all()


@pytest.mark.slow
def test_a_merge_carries_the_keys_and_a_cut_keeps_whole_images(store, model, text, tmp_path):
    """Merged and cut stores have the bytes that a build over the same images has; a cut says how many it left out."""
    build.merge([str(store.directory)], tmp_path / "all")
    told = HIDDEN.told(store.records("hidden"), 32)
    bits = told.mean_excess * store.codes[0].size
    limit = float(np.median(bits))
    build.merge([str(store.directory)], tmp_path / "cut", excess_above=limit)
    for name, kept in (("all", np.ones(IMAGES, bool)), ("cut", bits > limit)):
        made = dataclasses.replace(Datastore.open(tmp_path / name), backbone=model.backbone_fingerprint)
        made.verify()
        np.testing.assert_array_equal(made.codes, store.codes[kept])
        np.testing.assert_array_equal(made.records("hidden"), store.records("hidden")[kept])
        np.testing.assert_array_equal(made.table("hidden"), store.table("hidden"))
    with pytest.raises(UserError, match="no image of the stores to merge is wanted"):
        build.merge([str(store.directory)], tmp_path / "none", excess_above=1e9)
