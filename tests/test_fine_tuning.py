"""Laws of fine-tuning: a frozen base by reference, microbatches, precision, a start from another run, the best."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from arrag_jax.config import MeshConfig, OptimizerConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError
from arrag_jax.mesh import make_mesh, put_batch
from arrag_jax.training.checkpoint import Checkpoints, read_params
from arrag_jax.training.export import export_checkpoint
from arrag_jax.training.loop import make_train_step, train
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from helpers.toy import ONE_DEVICE, WIDTH, ToyTask, assert_same_bits, by_path, final_state, lines, losses, toy_config

OTHER = toy_config(seed=5, ema_decay=0.5, eval_every=2, steps=8)
# AdamW adds 1e-8 to a gradient's size: clipped so far down, a gradient would show its rounding in the update.
UNCLIPPED = OptimizerConfig(warmup_steps=0, clip_norm=1e9)
STILL = OptimizerConfig(learning_rate=0.0)


def one_step(task: ToyTask, **changes):
    """State after one step from scratch, and the step's metrics."""
    config = toy_config(optimizer=UNCLIPPED, **changes)
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, config.steps)
    graph, frozen, state = init_state(task, optimizer, config, mesh)
    batch = next(make_loader(task.train_source(), config.batch_size, config.seed))
    step = make_train_step(task, graph, optimizer, config)
    return step(state, frozen, put_batch(batch, mesh, config.accumulate))


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """A finished run with a moving average."""
    workdir = tmp_path_factory.mktemp("other")
    train(OTHER, ToyTask(), workdir)
    return workdir


def test_frozen_weights_are_in_no_checkpoint(other_run):
    tree = ocp.PyTreeCheckpointer().metadata(other_run / "checkpoints" / "8" / "state").item_metadata.tree
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert "params/middle" in paths and not [path for path in paths if "enter" in path or "leave" in path]


@pytest.mark.slow
def test_a_run_on_another_base_is_refused(tmp_path):
    train(toy_config(steps=2), ToyTask(base="a"), tmp_path)
    assert json.loads((tmp_path / "base.json").read_text()) == {"model": "a"}
    with pytest.raises(UserError, match=r"on another base: model \('a' there, 'b' now\)"):
        train(toy_config(steps=3), ToyTask(base="b"), tmp_path)


@pytest.mark.slow
def test_a_run_that_has_kept_no_step_binds_nobody(tmp_path):
    """As when the first command was mistyped: the mended one is as good as in a new folder."""

    class Mistyped(ToyTask):
        def eval_batches(self, batch_size):
            raise UserError("no such split")

    with pytest.raises(UserError, match="no such split"):
        train(toy_config(steps=2, batch_size=8), Mistyped(base="a"), tmp_path / "run")
    for name in ("run", "new"):
        train(toy_config(steps=2), ToyTask(), tmp_path / name)
    assert_same_bits(*(final_state(tmp_path / name, toy_config(steps=2)) for name in ("run", "new")))


@pytest.mark.parametrize("name", ["config.json", "base.json"])
@pytest.mark.parametrize("text", ['{"task": "pri', "[1]"])
def test_a_damaged_record_is_named(tmp_path, name, text):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is damaged .*; delete it"):
        train(toy_config(), ToyTask(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE_DEVICE, MeshConfig(data=2, fsdp=2)])
def test_microbatches_give_the_update_of_the_whole_batch(mesh):
    task = ToyTask(noise=False)
    (whole, whole_metrics), (parts, parts_metrics) = (one_step(task, accumulate=n, mesh=mesh) for n in (1, 4))
    # AdamW divides the gradient by its own size: the first moment shows the gradient as it came.
    whole, parts = by_path(whole), by_path(parts)
    moments = [path for path in whole if path.startswith("optimizer/") and "/mu/" in path]
    assert len(moments) == 2
    for path in ["params/middle", "params/bias", "rest/examples", *moments]:
        np.testing.assert_allclose(parts[path], whole[path], rtol=0, atol=1e-6, err_msg=path)
    for name in whole_metrics:
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)


class KeyTask(ToyTask):
    """Its gradient is a random number of the microbatch's key."""

    def loss(self, model, batch, key):
        noise = jax.random.normal(key)
        return noise * model.middle[...][0, 0], {"noise": noise}


@pytest.mark.slow
def test_every_microbatch_has_its_own_key():
    _, metrics = one_step(KeyTask(), accumulate=4)
    loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))[0]
    noise = [jax.random.normal(key) for key in jax.random.split(loss_key, 4)]
    np.testing.assert_allclose(metrics["noise"], np.mean(noise), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], abs(np.mean(noise)), rtol=1e-5)


def test_a_batch_that_microbatches_do_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size=16 must be a multiple of the mesh's 1 devices times accumulate=3"):
        train(toy_config(accumulate=3), ToyTask(), tmp_path)


class PrecisionTask(ToyTask):
    """Notes the precision in which each part of the protocol sees the trained parameters."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def loss(self, model, batch, key):
        self.seen["loss"] = model.middle[...].dtype.name
        return super().loss(model, batch, key)

    def after_update(self, model, key):
        self.seen["after_update"] = model.middle[...].dtype.name

    def eval_metrics(self, model, batch):
        self.seen["eval_metrics"] = model.middle[...].dtype.name
        return super().eval_metrics(model, batch)

    def export(self, model, directory, run):
        self.seen["export"] = model.middle[...].dtype.name


@pytest.mark.slow
def test_low_precision_is_in_loss_and_evaluation_alone(tmp_path):
    task, config = PrecisionTask(), toy_config(compute_dtype="bfloat16", ema_decay=0.5, steps=2, accumulate=2)
    train(config, task, tmp_path)
    half = {"loss": "bfloat16", "eval_metrics": "bfloat16"}
    assert task.seen == half | {"after_update": "float32", "export": "float32"}
    kinds = {leaf.dtype for leaf in final_state(tmp_path, config).values() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {np.dtype("float32")}


@pytest.mark.slow
def test_a_start_from_another_run_takes_its_best_average(tmp_path, other_run, capsys):
    with Checkpoints(other_run, ToyTask.best_metric) as checkpoints:
        best = checkpoints.best_step()
    # The same run, ended at its best step, exports that average.
    train(dataclasses.replace(OTHER, steps=best), ToyTask(), tmp_path / "best")
    expected = np.load(tmp_path / "best" / "export" / "weights.npz")["middle"]
    config = toy_config(init_from=str(other_run), optimizer=STILL, ema_decay=0.9, steps=4)
    capsys.readouterr()
    train(config, ToyTask(noise=False), tmp_path / "tuned")
    assert f"starting from step {best} of {other_run}" in capsys.readouterr().err
    assert list(losses(tmp_path / "tuned")) == [1, 2, 3, 4]
    tuned = np.load(tmp_path / "tuned" / "export" / "weights.npz")["middle"]
    np.testing.assert_allclose(tuned, expected, rtol=0, atol=1e-7)  # the rate is 0; the new average's rounding is not
    # Its own checkpoint comes first: the other run may be gone by then.
    train(dataclasses.replace(config, init_from="gone", steps=5), ToyTask(noise=False), tmp_path / "tuned")
    assert "continuing at step 4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_start_from_nothing_or_from_another_model_is_refused(tmp_path, other_run):
    with pytest.raises(UserError, match=r"init_from=.*gone holds no checkpoint"):
        train(toy_config(init_from=str(tmp_path / "gone")), ToyTask(), tmp_path / "run")
    with pytest.raises(UserError, match=rf"of another model: middle \(\({WIDTH}, {WIDTH}\) there, \(3,\) now\)"):
        read_params(other_run, {"middle": jnp.zeros(3), "bias": jnp.zeros(WIDTH)}, ToyTask.best_metric)
    shutil.copytree(other_run, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints").glob("*/state/**/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"is damaged .*; choose another init_from"):
        train(toy_config(init_from=str(tmp_path / "damaged")), ToyTask(), tmp_path / "run")


class ScriptedTask(ToyTask):
    """Its held-out error after each step is written down beforehand."""

    def __init__(self, mode: str):
        super().__init__()
        self.best_metric = ("error", mode)

    def eval_metrics(self, model, batch):
        return {"error": jnp.array([0.0, 4.0, 1.0, jnp.nan, 9.0, 3.0, 5.0])[model.examples[...] // 16]}


@pytest.mark.slow
@pytest.mark.parametrize("eval_every", [1, 2])  # every checkpoint has metrics, or every second
@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_the_best_and_the_newest_two_are_kept(tmp_path, mode, best, eval_every):
    train(toy_config(steps=6, eval_every=eval_every, checkpoint_every=1), ScriptedTask(mode), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [best, 5, 6]
    with Checkpoints(tmp_path, ("error", mode)) as checkpoints:
        assert checkpoints.best_step() == best


@pytest.mark.slow
def test_a_checkpoint_is_exported_the_best_or_the_last(tmp_path):
    """Also of a run that is gone before its end; the parameters are those of the checkpoint, byte for byte."""
    task, config, run = ScriptedTask("min"), toy_config(steps=4, eval_every=2, checkpoint_every=1), tmp_path / "run"
    train(config, task, run)
    whole = np.load(run / "export" / "weights.npz")
    shutil.rmtree(run / "export")
    like = {"middle": jnp.zeros((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
    for last, step in ((False, 2), (True, 4)):
        target = tmp_path / str(step)
        assert export_checkpoint(task, config, run, target, last) == step
        _, params = read_params(run, like, task.best_metric, last=last)
        exported = np.load(target / "weights.npz")
        assert exported["middle"].tobytes() == np.asarray(params["middle"]).tobytes()
        assert (exported["middle"].tobytes() == whole["middle"].tobytes()) is last
        np.testing.assert_array_equal(exported["enter"], whole["enter"])
    with pytest.raises(UserError, match=r"on another base: model \('toy' there, 'b' now\)"):
        export_checkpoint(ToyTask(base="b"), config, run, tmp_path / "none")
    with pytest.raises(UserError, match=r"--source=.*empty holds no checkpoint"):
        export_checkpoint(task, config, tmp_path / "empty", tmp_path / "none")


@pytest.mark.slow
def test_pace_and_memory_are_written(tmp_path):
    train(toy_config(steps=3), ToyTask(), tmp_path)
    for line in lines(tmp_path):
        if "loss" in line:
            assert line["tokens_per_second"] == pytest.approx(line["steps_per_second"] * 16 * ToyTask.tokens)
            assert 0 < line["memory_gib"] < 1024
