"""A toy task for the tests of training. Run as a script it trains that task: the tests of kills need a process."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from arrag_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.mesh import make_mesh
from arrag_jax.nn.variables import Adapter, freeze
from arrag_jax.training.checkpoint import Checkpoints
from arrag_jax.training.loop import train
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.task import Task

WIDTH = 256  # so that the middle matrix is large enough to be sharded
ONE_DEVICE = MeshConfig(data=1, fsdp=1)


class Counter(nnx.Variable):
    """What the toy's loss writes."""


class ToyModel(nnx.Module):
    """Frozen first and last layers, a trained middle with dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.enter = nnx.Linear(4, WIDTH, rngs=rngs)
        self.middle = Adapter(0.01 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.bias = Adapter(jnp.zeros(WIDTH))
        self.leave = nnx.Linear(WIDTH, 2, rngs=rngs)
        freeze(self.enter)
        freeze(self.leave)
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
    best_metric = ("error", "min")
    tokens = 5
    vocabulary = MappingProxyType({})

    def __init__(self, pause: float = 0.0, noise: bool = True, base: str = "toy"):
        self._pause, self._noise, self._base = pause, noise, base

    def load(self, mesh):
        return ()

    def init_model(self, rngs, loaded=None):
        return ToyModel(rngs)

    def base(self):
        return {"model": self._base}

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

    def after_update(self, model, key):
        model.bias[...] = model.bias[...] + 1e-4 * self._noise * jax.random.normal(key, model.bias.shape)

    def eval_metrics(self, model, batch):
        return {"error": jnp.mean(jnp.abs(model(batch["x"], dropout=False) - batch["y"]))}

    def sample_callback(self, mesh):
        shades_of = jax.jit(lambda weights: 255 * jax.nn.sigmoid(jnp.dot(weights, weights))[:8, :8, None])
        return lambda model: {"middle": np.asarray(shades_of(model.middle[...]).repeat(3, -1), np.uint8)}

    def export(self, model, directory, run):
        kernels = {"enter": model.enter.kernel[...], "leave": model.leave.kernel[...]}
        np.savez(directory / "weights.npz", middle=model.middle[...], **kernels)


def toy_config(**changes) -> TrainConfig:
    base = dict(
        task="prior", steps=12, batch_size=16, options={}, mesh=ONE_DEVICE, log_every=1, eval_every=6,
        checkpoint_every=4, optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
    )  # fmt: skip
    return TrainConfig(**base | changes)


def final_state(workdir: Path, config: TrainConfig, task: Task | None = None) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint by its path, optimizer state and random keys included."""
    task, mesh = task or ToyTask(), make_mesh(config.mesh)
    _, _, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    with Checkpoints(workdir, task.best_metric) as checkpoints:
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


def split_leaves(workdir: Path) -> set[str]:
    """Paths of the leaves of the newest checkpoint that were saved from several devices' shares."""
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().metadata(newest / "state").item_metadata.tree)
    split = [path for path, leaf in leaves if "fsdp" in leaf.sharding.partition_spec]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path in split}


def lines(workdir: Path) -> list[dict]:
    """The whole lines of ``metrics.jsonl``, which may be being written, or not be there yet."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in whole]


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def kill(process: subprocess.Popen, workdir: Path, after: int, wait: float) -> None:
    """Ends a running training some seconds after a step, without warning."""
    while process.poll() is None and max(losses(workdir), default=0) < after:
        time.sleep(0.005)
    time.sleep(wait)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()


PROCESS_CONFIG = toy_config(steps=60, checkpoint_every=7)

if __name__ == "__main__":
    train(PROCESS_CONFIG, ToyTask(pause=0.001), Path(sys.argv[1]))
