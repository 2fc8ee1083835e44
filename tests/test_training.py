"""Laws of the training loop, on a toy task."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.config import MeshConfig, OptimizerConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError, run_command
from arrag_jax.files import exclusive_lock
from arrag_jax.mesh import make_mesh, put_batch
from arrag_jax.training.loop import make_evaluation, make_train_step, train
from arrag_jax.training.metrics import MetricWriter
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.tensorboard import Event, SessionLog
from helpers import children
from helpers.toy import (
    ONE_DEVICE,
    PROCESS_CONFIG,
    ToyTask,
    assert_same_bits,
    by_path,
    final_state,
    kill,
    losses,
    toy_config,
)


@pytest.mark.slow
def test_training_touches_the_trainable_alone(tmp_path):
    config = toy_config(optimizer=OptimizerConfig(warmup_steps=0), ema_decay=0.5)
    _, _, start = init_state(ToyTask(), make_optimizer(config.optimizer, config.steps), config, make_mesh(ONE_DEVICE))
    start = by_path(start)
    train(config, ToyTask(), tmp_path)
    end = final_state(tmp_path, config)
    initial, exported = ToyTask().init_model(nnx.Rngs(config.seed)), np.load(tmp_path / "export" / "weights.npz")
    for layer in ("enter", "leave"):
        np.testing.assert_array_equal(exported[layer], getattr(initial, layer).kernel[...])
    for path in ("params/middle", "params/bias"):
        assert not np.array_equal(start[path], end[path])
    with_shape = [path for path in end if path.startswith("optimizer/") and end[path].ndim]
    assert with_shape and all(path.endswith(("/middle", "/bias")) for path in with_shape)
    assert end["rest/examples"] == config.steps * config.batch_size


@pytest.mark.slow
def test_sharded_training_is_training_on_one_device(tmp_path):
    for name, mesh in (("one", ONE_DEVICE), ("mesh", MeshConfig(data=2, fsdp=4))):
        train(toy_config(mesh=mesh, steps=8), ToyTask(), tmp_path / name)
    one, mesh = losses(tmp_path / "one"), losses(tmp_path / "mesh")
    assert list(one) == list(mesh) == list(range(1, 9))
    np.testing.assert_allclose(list(mesh.values()), list(one.values()), rtol=1e-5)
    exported = [np.load(tmp_path / name / "export" / "weights.npz")["middle"] for name in ("one", "mesh")]
    np.testing.assert_allclose(exported[1], exported[0], atol=1e-5)


@pytest.mark.slow
def test_moving_average_is_the_recurrence_and_is_what_is_exported(tmp_path):
    config = toy_config(ema_decay=0.9, steps=5)
    task, mesh = ToyTask(), make_mesh(ONE_DEVICE)
    optimizer = make_optimizer(config.optimizer, config.steps)
    graph, frozen, state = init_state(task, optimizer, config, mesh)
    data = make_loader(task.train_source(), config.batch_size, config.seed)
    expected = np.asarray(state.params["middle"])
    step = make_train_step(task, graph, optimizer, config)
    for _ in range(config.steps):
        state, _ = step(state, frozen, put_batch(next(data), mesh))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["middle"])
    train(config, task, tmp_path)
    exported = np.load(tmp_path / "export" / "weights.npz")["middle"]
    np.testing.assert_allclose(exported, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_examples():
    config, task, mesh = toy_config(), ToyTask(), make_mesh(MeshConfig(data=2, fsdp=4))
    graph, frozen, state = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    metrics, _ = make_evaluation(task, graph, frozen, config, mesh)(state)
    batches = list(task.eval_batches(config.batch_size))
    everything = {name: np.concatenate([batch[name] for batch in batches]) for name in ("x", "y")}
    expected = task.eval_metrics(nnx.merge(graph, state.params, frozen, state.rest), everything)["error"]
    np.testing.assert_allclose(metrics["eval/error"], expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_batch_is_evaluated_that_is_larger_than_one_that_is_trained_on(accumulate):
    """So that what fits in training fits in evaluation."""
    asked = []

    class Asked(ToyTask):
        def eval_batches(self, batch_size):
            asked.append(batch_size)
            return super().eval_batches(batch_size)

    config, task, mesh = toy_config(accumulate=accumulate), Asked(), make_mesh(ONE_DEVICE)
    graph, frozen, _ = init_state(task, make_optimizer(config.optimizer, config.steps), config, mesh)
    make_evaluation(task, graph, frozen, config, mesh)
    assert asked == [config.batch_size // accumulate]


class SignalledTask(ToyTask):
    """Sends its own process a signal while it evaluates."""

    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def sample_callback(self, mesh):
        return lambda model: os.kill(os.getpid(), self._number) or {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_continued_is_uninterrupted(tmp_path, capfd, number):
    config = toy_config()
    train(config, ToyTask(), tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda _: train(config, SignalledTask(number), tmp_path / "parts"), [])
    code, line = {
        signal.SIGTERM: (0, "stopped and saved at step 7; run the same command again to continue"),
        signal.SIGINT: (130, "error: interrupted; run the same command again to continue"),
    }[number]
    assert stop.value.code == code
    error = capfd.readouterr().err
    assert {"stopping after this step; once more stops at once", line} <= set(error.splitlines())
    assert "Traceback" not in error
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
        kill(start_process(tmp_path / "parts"), tmp_path / "parts", after, moments.uniform(0, 0.1))
    assert start_process(tmp_path / "parts").wait() == 0
    assert whole.wait() == 0
    assert_same_bits(final_state(tmp_path / "whole", PROCESS_CONFIG), final_state(tmp_path / "parts", PROCESS_CONFIG))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def start_process(workdir: Path) -> subprocess.Popen:
    """The toy task in a process of its own, on one device."""
    command = [sys.executable, "-m", "helpers.toy", str(workdir)]
    return subprocess.Popen(command, env=children.alone(), stderr=subprocess.DEVNULL)


class DivergingTask(ToyTask):
    """Its loss is no number when the 96th example has been seen (step 6)."""

    def loss(self, model, batch, key):
        loss, metrics = super().loss(model, batch, key)
        return jnp.where(model.examples[...] == 96, jnp.nan, loss), metrics


class SteepTask(ToyTask):
    """Its loss stays finite, its gradient is infinite when the 96th example has been seen (step 6)."""

    def loss(self, model, batch, key):
        loss, metrics = super().loss(model, batch, key)
        weight = model.middle[...][0, 0]
        return loss + jnp.sqrt(weight - jax.lax.stop_gradient(weight) + (model.examples[...] != 96)), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "named"), [(DivergingTask, "the loss is nan"), (SteepTask, "the gradient's norm is (inf|nan)")]
)
def test_a_number_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, task, named):
    """The step before which all was well can be gone on from, by a task that has been mended."""
    config = toy_config(checkpoint_every=3, eval_every=12)
    data = make_loader(ToyTask().train_source(), 16, seed=0)
    batches = [next(data)["example"] for _ in range(6)]
    examples = ", ".join(map(str, batches[5][:8]))
    with pytest.raises(UserError, match=rf"{named} at step 6 \(examples {examples}, …\)"):
        train(config, task(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"]
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path, config).values())
    train(config, ToyTask(), tmp_path)
    assert list(losses(tmp_path)) == list(range(1, 13))
    assert np.isfinite(list(losses(tmp_path).values())).all()


def test_a_workdir_is_for_one_run_at_a_time(tmp_path):
    with exclusive_lock(tmp_path), pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
        train(toy_config(), ToyTask(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_workdir_of_another_run_is_refused_and_a_longer_one_continues(tmp_path):
    train(toy_config(steps=4), ToyTask(), tmp_path)
    other = toy_config(steps=4, seed=1, optimizer=OptimizerConfig(warmup_steps=3, learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate .* seed"):
        train(other, ToyTask(), tmp_path)
    train(toy_config(steps=6), ToyTask(), tmp_path)
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="is at step 6 already, past steps=5"):
        train(toy_config(steps=5), ToyTask(), tmp_path)


@pytest.mark.slow
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


def test_tensorboard_files_are_written_without_torch():
    """It is installed here, and tensorboardX imports it where it can."""
    program = "import sys; from arrag_jax.training import tensorboard; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=children.alone(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_tensorboard_gets_the_same_figures_and_a_full_disk_is_told(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path, 3)
    writer.scalars(4, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # a record: 8 bytes of length, 4 of checksum, the event, 4 of checksum
        end = 12 + int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12:end]))
        data = data[end + 4 :]
    version, start, loss = events
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, SessionLog.START)
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (4, "loss", 0.5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
        writer.scalars(5, {"loss": 0.25})
    writer.close()
