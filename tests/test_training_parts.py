"""Laws of the parts of training: loader, schedule, optimizers."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrag_jax.config import OptimizerConfig
from arrag_jax.data.pipeline import make_loader
from arrag_jax.errors import UserError
from arrag_jax.training.optimizer import make_optimizer, make_schedule


def test_loader_resumes_to_the_example_and_each_epoch_is_one_pass():
    source = [{"id": np.int32(i)} for i in range(12)]
    loader = make_loader(source, 4, seed=3)
    first = [next(loader)["id"] for _ in range(4)]
    state = loader.get_state()
    after = [next(loader)["id"] for _ in range(5)]
    resumed = make_loader(source, 4, seed=3, threads=1)
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed)["id"] for _ in range(5)], after)
    epochs = np.concatenate(first + after).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(12), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_every_example_carries_its_number_in_the_source_in_every_epoch():
    loader = make_loader([{"id": np.int32(i)} for i in range(12)], 8, seed=3)
    for batch in (next(loader) for _ in range(6)):
        np.testing.assert_array_equal(batch["example"], batch["id"])


def test_processes_share_a_global_batch(monkeypatch):
    source = grain.MapDataset.source([{"id": np.int32(i)} for i in range(12)])
    whole = make_loader(source, 6, seed=3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(make_loader(source, 6, seed=3))
    for _ in range(5):
        shares = [next(part)["id"] for part in parts]
        assert [len(share) for share in shares] == [3, 3]
        np.testing.assert_array_equal(np.concatenate(shares), next(whole)["id"])


def test_schedule_is_warmup_hold_decay():
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=0.25), 100)
    expected = np.interp(np.arange(101), [0, 10, 75, 100], [0.0, 2.0, 2.0, 0.02])
    np.testing.assert_allclose([schedule(step) for step in range(101)], expected, rtol=1e-5, atol=1e-7)
    whole_decay = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=1.0), 100)
    np.testing.assert_allclose([whole_decay(0), whole_decay(100)], [2.0, 0.02], rtol=1e-6)


def test_muon_orthogonalises_the_body_and_leaves_the_rest_to_adamw():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": {0: {"kernel": jax.random.normal(keys[0], (48, 32)), "scale": jnp.ones(32)}},
        "embed_tokens": {"embedding": jax.random.normal(keys[1], (16, 32))},
    }
    grads = jax.tree.map(lambda leaf: jax.random.normal(keys[2], leaf.shape), params)
    config = dict(learning_rate=0.1, warmup_steps=0, decay_fraction=0.0, clip_norm=1e9)
    updates = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerConfig(name=name, **config), 10)
        updates[name] = jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]
    body = np.asarray(updates["muon"]["layers"][0]["kernel"])
    singular = np.linalg.svd(body, compute_uv=False) / (0.1 * 0.2 * np.sqrt(48))
    assert singular.min() > 0.6 and singular.max() < 1.3  # five Newton-Schulz steps end near 1
    for path in (("layers", 0, "scale"), ("embed_tokens", "embedding")):
        by_muon, by_adamw = updates["muon"], updates["adamw"]
        for key in path:
            by_muon, by_adamw = by_muon[key], by_adamw[key]
        np.testing.assert_allclose(by_muon, by_adamw, rtol=1e-4)


def test_rate_scales_scale_the_steps_of_the_parts_they_name():
    params = {"blender": {"kernel": jnp.ones(3), "gate": jnp.ones(2)}, "head": jnp.ones(4)}
    grads = jax.tree.map(lambda leaf: jnp.linspace(0.1, 0.2, leaf.size), params)

    def step(**scales: float):
        optimizer = make_optimizer(OptimizerConfig(rate_scales=scales, warmup_steps=0), 10)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain, scaled = step(), step(gate=0.5, blender=0.25)
    np.testing.assert_array_equal(scaled["blender"]["gate"], 0.5 * plain["blender"]["gate"])
    np.testing.assert_array_equal(scaled["blender"]["kernel"], 0.25 * plain["blender"]["kernel"])
    np.testing.assert_array_equal(scaled["head"], plain["head"])
    with pytest.raises(UserError, match=r"rate_scales\.gates"):
        step(gates=0.5)


def test_clipping_bounds_what_the_optimizer_sees():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), 10)
    params = {"w": jnp.zeros((3, 3))}
    _, state = optimizer.update({"w": jnp.full((3, 3), 100.0)}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(jnp.linalg.norm(moment), 0.5 * (1 - OptimizerConfig().b1), rtol=1e-5)
