"""Laws of the parts of training: loader, schedule, optimizers."""

import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrag_jax.config import OptimizerConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError
from arrag_jax.training.loop import train
from arrag_jax.training.optimizer import make_optimizer, make_schedule
from arrag_jax.training.program import Profile
from helpers.toy import ToyTask, toy_config


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


@pytest.mark.slow
def test_clipping_bounds_what_the_optimizer_sees():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), 10)
    params = {"w": jnp.zeros((3, 3))}
    _, state = optimizer.update({"w": jnp.full((3, 3), 100.0)}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(jnp.linalg.norm(moment), 0.5 * (1 - OptimizerConfig().b1), rtol=1e-5)


@pytest.mark.parametrize("text", ["3", "0:2", "4:3", "a:b", "1:2:3"])
def test_a_profile_is_two_steps(text):
    with pytest.raises(UserError, match="must be START:STOP"):
        Profile.parse(text)


@pytest.mark.slow
def test_a_profile_of_two_steps_is_written_and_the_memory_of_a_step_is_told(tmp_path, capsys):
    config = toy_config(steps=4, eval_every=4)
    train(config, ToyTask(), tmp_path, Profile.parse("2:3"))
    written = [path.name for path in (tmp_path / "profile").rglob("*") if path.is_file()]
    assert any(name.endswith(".xplane.pb") for name in written)  # TensorBoard's
    assert any(name.startswith("perfetto_trace") for name in written)
    said = capsys.readouterr().err
    (needed,) = re.findall(r"a step needs ([\d.]+) GiB per device", said)
    assert 0 <= float(needed) < 1
