"""The training loop on a toy task. Run as a script it trains that task: the tests of kills need a process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from arrag_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from arrag_jax.data.pipeline import make_loader
from arrag_jax.errors import UserError
from arrag_jax.mesh import make_mesh, put_batch
from arrag_jax.training.checkpoint import Checkpoints
from arrag_jax.training.loop import init_state, make_evaluation, make_train_step, train
from arrag_jax.training.metrics import MetricWriter
from arrag_jax.training.optimizer import make_optimizer, make_schedule

WIDTH = 256  # so that the middle matrix is large enough to be sharded
ONE_DEVICE = MeshConfig(data=1, fsdp=1)


class Adapter(nnx.Param):
    """What the toy trains."""


class Counter(nnx.Variable):
    """What the toy's loss writes."""


class ToyModel(nnx.Module):
    """A frozen input layer, a trained middle with dropout, a frozen output layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.enter = nnx.Linear(4, WIDTH, rngs=rngs)
        self.middle = Adapter(0.01 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.bias = Adapter(jnp.zeros(WIDTH))
        self.leave = nnx.Linear(WIDTH, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.examples = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x, dropout: bool):
        hidden = jnp.tanh(self.enter(x))
        hidden = hidden + jnp.dot(hidden, self.middle[...]) + self.bias[...][None]
        return self.leave(self.dropout(hidden, deterministic=not dropout))


class SlowRows:
    """64 examples, each served after a short sleep, so that a run lasts long enough to be killed."""

    def __init__(self, pause: float):
        self._pause = pause

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(self._pause)
        x = np.random.default_rng(int(index)).normal(size=4).astype(np.float32)
        return {"x": x, "y": np.array([x[0] * x[1], x.sum()], np.float32)}


class ToyTask:
    """Regression with noise on the input; every part of the protocol does something."""

    trainable = Adapter

    def __init__(self, pause: float = 0.0, noise: bool = True):
        self._pause, self._noise = pause, noise

    def init_model(self, rngs):
        return ToyModel(rngs)

    def train_source(self):
        return SlowRows(self._pause)

    def eval_batches(self, batch_size):
        rows = SlowRows(0.0)
        for start, stop in ((0, batch_size), (batch_size, batch_size + 3)):
            examples = [rows[i] for i in range(start, stop)]
            yield {name: np.stack([example[name] for example in examples]) for name in ("x", "y")}

    def loss(self, model, batch, key):
        model.examples[...] += batch["x"].shape[0]
        noise = 0.1 * self._noise * jax.random.normal(key, batch["x"].shape)
        loss = jnp.mean((model(batch["x"] + noise, dropout=self._noise) - batch["y"]) ** 2)
        return loss, {"noise": jnp.mean(noise)}

    def after_update(self, model, batch, key):
        model.bias[...] = model.bias[...] + 1e-4 * jax.random.normal(key, model.bias.shape)

    def eval_metrics(self, model, batch):
        return {"error": jnp.mean(jnp.abs(model(batch["x"], dropout=False) - batch["y"]))}

    def pictures(self, model):
        shades = jax.jit(lambda weights: jax.nn.sigmoid(jnp.dot(weights, weights)))(model.middle[...])
        return {"middle": np.asarray(255 * shades[:8, :8, None].repeat(3, -1), np.uint8)}

    def export(self, model, directory):
        np.savez(directory / "weights.npz", middle=model.middle[...])


def toy_config(**changes) -> TrainConfig:
    base = dict(
        task="prior", steps=12, batch_size=16, preset="toy", options={}, mesh=ONE_DEVICE, log_every=1, eval_every=6,
        checkpoint_every=4, optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
    )  # fmt: skip
    return TrainConfig(**base | changes)


def final_state(workdir: Path, config: TrainConfig) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint by its path, optimizer state and random keys included."""
    task, mesh = ToyTask(), make_mesh(config.mesh)
    _, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(state, make_loader(task.train_source(), config.batch_size, config.seed))
    return by_path(state)


def by_path(tree) -> dict[str, np.ndarray]:
    def plain(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): plain(leaf) for path, leaf in leaves}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path, strict=True)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_touches_the_trainable_alone(tmp_path, name):
    config = toy_config(optimizer=OptimizerConfig(name=name, warmup_steps=0), ema_decay=0.5)
    _, start = init_state(ToyTask(), make_optimizer(config.optimizer, config.steps), config, make_mesh(ONE_DEVICE))
    start = by_path(start)
    train(config, ToyTask(), tmp_path)
    end = final_state(tmp_path, config)
    frozen = [path for path in start if path.startswith("rest/") and "dropout" not in path and "examples" not in path]
    assert len(frozen) == 4
    assert_same_bits({path: start[path] for path in frozen}, {path: end[path] for path in frozen})
    for path in ("params/middle", "params/bias"):
        assert not np.array_equal(start[path], end[path])
    with_shape = [path for path in end if path.startswith("optimizer/") and end[path].ndim and "ns_coeffs" not in path]
    assert with_shape and all(path.endswith(("/middle", "/bias")) for path in with_shape)
    assert end["rest/examples"] == config.steps * config.batch_size


def test_sharded_training_is_training_on_one_device(tmp_path):
    for name, mesh in (("one", ONE_DEVICE), ("mesh", MeshConfig(data=2, fsdp=4))):
        train(toy_config(mesh=mesh, steps=8), ToyTask(), tmp_path / name)
    one, mesh = losses(tmp_path / "one"), losses(tmp_path / "mesh")
    assert list(one) == list(mesh) == list(range(1, 9))
    np.testing.assert_allclose(list(mesh.values()), list(one.values()), rtol=1e-5)
    exported = [np.load(tmp_path / name / "export" / "weights.npz")["middle"] for name in ("one", "mesh")]
    np.testing.assert_allclose(exported[1], exported[0], atol=1e-5)


def test_moving_average_is_the_recurrence_and_is_what_is_exported(tmp_path):
    config = toy_config(ema_decay=0.9, steps=5)
    task, mesh = ToyTask(), make_mesh(ONE_DEVICE)
    optimizer = make_optimizer(config.optimizer, config.steps)
    graph, state = init_state(task, optimizer, config, mesh)
    data = make_loader(task.train_source(), config.batch_size, config.seed)
    expected = np.asarray(state.params["middle"])
    step = make_train_step(task, graph, optimizer, config)
    for _ in range(config.steps):
        state, _ = step(state, put_batch(next(data), mesh))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["middle"])
    train(config, task, tmp_path)
    exported = np.load(tmp_path / "export" / "weights.npz")["middle"]
    np.testing.assert_allclose(exported, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_is_the_mean_over_all_examples():
    config, task, mesh = toy_config(), ToyTask(), make_mesh(MeshConfig(data=2, fsdp=4))
    graph, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    metrics, _ = make_evaluation(task, graph, config, mesh)(state)
    batches = list(task.eval_batches(config.batch_size))
    everything = {name: np.concatenate([batch[name] for batch in batches]) for name in ("x", "y")}
    expected = task.eval_metrics(nnx.merge(graph, state.params, state.rest), everything)["error"]
    np.testing.assert_allclose(metrics["eval/error"], expected, rtol=1e-5)


class SignalledTask(ToyTask):
    """Sends its own process a signal while it evaluates."""

    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def pictures(self, model):
        os.kill(os.getpid(), self._number)
        return {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_continued_is_uninterrupted(tmp_path, capsys, number):
    config = toy_config()
    train(config, ToyTask(), tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as stop:
        train(config, SignalledTask(number), tmp_path / "parts")
    if number == signal.SIGTERM:
        assert stop.value.code == 0
        assert "run the same command again" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert max(losses(tmp_path / "parts")) == 7  # the evaluation is in step 6; 7 is the step it finishes
    assert not (tmp_path / "parts" / "export").exists()
    train(config, ToyTask(), tmp_path / "parts")
    assert_same_bits(final_state(tmp_path / "whole", config), final_state(tmp_path / "parts", config))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.slow
def test_killed_three_times_is_uninterrupted(tmp_path):
    moments = random.Random(0)
    whole = start_process(tmp_path / "whole")
    for after in (6, 25, 45):
        process = start_process(tmp_path / "parts")
        metrics = tmp_path / "parts" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and max(losses_so_far(metrics), default=0) >= after):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    assert start_process(tmp_path / "parts").wait() == 0
    assert whole.wait() == 0
    assert_same_bits(final_state(tmp_path / "whole", PROCESS_CONFIG), final_state(tmp_path / "parts", PROCESS_CONFIG))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def losses_so_far(metrics: Path) -> list[int]:
    """Steps of the whole lines of a file that is being written."""
    whole = metrics.read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line)["step"] for line in whole]


def start_process(workdir: Path) -> subprocess.Popen:
    """This file as a script: the toy task in a process of its own, on one device."""
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen([sys.executable, __file__, str(workdir)], env=env, stderr=subprocess.DEVNULL)


class DivergingTask(ToyTask):
    """Its loss is no number when the 96th example has been seen (step 6)."""

    def loss(self, model, batch, key):
        loss, metrics = super().loss(model, batch, key)
        return jnp.where(model.examples[...] == 96, jnp.nan, loss), metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    with pytest.raises(UserError, match="loss is nan at step 6"):
        train(toy_config(checkpoint_every=3), DivergingTask(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"]


def test_a_workdir_of_another_run_is_refused_and_a_longer_one_continues(tmp_path):
    train(toy_config(steps=4), ToyTask(), tmp_path)
    other = toy_config(steps=4, seed=1, optimizer=OptimizerConfig(warmup_steps=3, learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate .* seed"):
        train(other, ToyTask(), tmp_path)
    train(toy_config(steps=6), ToyTask(), tmp_path)
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="is at step 6 already, past steps=5"):
        train(toy_config(steps=5), ToyTask(), tmp_path)


def test_damaged_and_half_written_checkpoints(tmp_path):
    config = toy_config()
    train(config, ToyTask(), tmp_path)
    expected = final_state(tmp_path, config)
    newest = tmp_path / "checkpoints" / "12"
    newest.rename(tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp")
    train(config, ToyTask(), tmp_path)  # takes the half-written one for none, and goes on from 8
    assert_same_bits(expected, final_state(tmp_path, config))
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{newest} is damaged .* delete that folder"):
        train(config, ToyTask(), tmp_path)


def test_metrics_after_the_restored_step_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.scalars(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    writer = MetricWriter(tmp_path, 3)
    writer.scalars(4, {"loss": 9.0})
    writer.close()
    assert losses(tmp_path) == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 9.0}


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
        assert sorted(np.concatenate(shares)) == sorted(next(whole)["id"])


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


def test_clipping_bounds_what_the_optimizer_sees():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), 10)
    params = {"w": jnp.zeros((3, 3))}
    _, state = optimizer.update({"w": jnp.full((3, 3), 100.0)}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]
    np.testing.assert_allclose(jnp.linalg.norm(moment), 0.5 * (1 - OptimizerConfig().b1), rtol=1e-5)


PROCESS_CONFIG = toy_config(steps=60, checkpoint_every=7)

if __name__ == "__main__":
    train(PROCESS_CONFIG, ToyTask(pause=0.001), Path(sys.argv[1]))
