"""The one training loop: mesh → model → optimizer → restore → steps → evaluate → export.

A ``Task`` says what is trained; this file knows no model. The step is a pure function of a state and a batch, and its
randomness depends only on (seed, step). Therefore a run that is killed at any moment and started again ends with the
same bits as a run that was never interrupted.
"""

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from arrag_jax import signals
from arrag_jax.config import TrainConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_folder
from arrag_jax.mesh import check_batch_size, compiler_options, fetched, make_mesh, put_batch, put_whole_batch
from arrag_jax.processes import require_same
from arrag_jax.training.checkpoint import Checkpoints, claimed, newest_step
from arrag_jax.training.metrics import Journal, training_minutes
from arrag_jax.training.optimizer import make_optimizer, make_schedule
from arrag_jax.training.program import NO_PROFILE, Profile, Step
from arrag_jax.training.state import TrainState, averaged_params, cast, init_state, resume_or_start, split
from arrag_jax.training.task import Batch, SampleImages, Scalars, Task, TaskStep


def train(config: TrainConfig, task: Task, workdir: Path, profile: Profile = NO_PROFILE) -> None:
    """Trains the task up to ``config.steps``, from the newest checkpoint in ``workdir`` if there is one.

    Writes to ``workdir``: config.json, base.json, checkpoints/, metrics.jsonl, tensorboard/, pictures/ and, at the end,
    export/ with the last weights. (``arrag_jax.convert`` exports the best ones.) After SIGTERM, the run finishes its
    step, saves it and exits with code 0. After SIGINT, it does the same and raises ``signals.Stop``. A second signal
    ends the program at once.

    Raises:
      UserError: if the workdir belongs to another run or is in use, a checkpoint is damaged, the mesh does not fit,
        ``init_from`` names another model, or a loss or gradient is no longer finite.
    """
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    base = task.base()
    require_same(base | {"newest step in --workdir": str(newest_step(workdir))}, "state")
    with claimed(workdir, config, base):
        model = take_steps(config, task, workdir, mesh, profile)
        hardware = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores a host"
        export(task, model, workdir / "export", {"hardware": hardware} | origin(workdir, config, config.steps), True)


def take_steps(config: TrainConfig, task: Task, workdir: Path, mesh: Mesh, profile: Profile = NO_PROFILE) -> nnx.Module:
    """Trains from the newest checkpoint to ``config.steps``, evaluates and saves; returns the model to export."""
    with Checkpoints(workdir, task.best_metric) as checkpoints, signals.held("step") as point:
        optimizer = make_optimizer(config.optimizer, config.steps)
        graph, frozen, state = init_state(task, optimizer, config, mesh)
        data = make_loader(task.train_source(), config.batch_size, config.seed)
        state = resume_or_start(state, data, checkpoints, task, config)
        done = int(state.step)
        if done > config.steps:
            raise UserError(f"{workdir} is at step {done} already, past steps={config.steps}: choose another --workdir")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        train_step = Step(make_train_step(task, graph, optimizer, config, shardings), mesh)
        evaluate = make_evaluation(task, graph, frozen, config, mesh)

        with Journal(config, task.tokens, workdir, done) as journal:
            for step in range(done + 1, config.steps + 1):
                batch = next(data)
                profile.before(step, workdir / "profile")
                state, metrics = train_step(state, frozen, put_batch(batch, mesh, config.accumulate))
                profile.after(step, metrics)
                journal.step_done(step, metrics, batch["example"])
                stopping, last, held_out = point.requested(step), step == config.steps, None
                if step % config.eval_every == 0 or last:
                    journal.flush()
                    held_out, pictures = evaluate(state)
                    journal.evaluated(step, held_out, pictures)
                if step % config.checkpoint_every == 0 or held_out is not None or stopping:
                    journal.flush()  # raises at a number that is not finite, before the state is saved
                    checkpoints.save(step, state, data, held_out)
                if stopping and not last:
                    checkpoints.wait()
                    leave(step)
    return nnx.merge(graph, averaged_params(state), frozen, state.rest)


def make_train_step(
    task: TaskStep,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    shardings: TrainState | None = None,
) -> Any:
    """Returns the jitted step: (state, frozen variables, microbatches) → (state, metrics). The state is donated.

    Args:
      shardings: of the state's leaves, before and after a step; None = those that XLA chooses.
    """
    schedule = make_schedule(config.optimizer, config.steps)

    def loss_of(params: PyTree, frozen: PyTree, rest: PyTree, batch: Batch, key: Array):
        model = nnx.merge(graph, cast(params, config.compute_dtype), frozen, rest)
        loss, metrics = task.loss(model, batch, key)
        return loss, ({"loss": loss, **metrics}, split(model, task.trainable)[3])

    out, extra = None if shardings is None else (shardings, None), compiler_options(shardings)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=extra)
    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Scalars]:
        loss_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        grads, metrics, rest = mean_gradient(loss_of, state.params, frozen, state.rest, batch, loss_key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        model = nnx.merge(graph, optax.apply_updates(state.params, updates), frozen, rest)
        task.after_update(model, update_key)
        _, params, _, rest = split(model, task.trainable)
        ema = optax.incremental_update(params, state.ema, 1 - config.ema_decay) if config.ema_decay else None
        metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, rest, optimizer_state, ema), metrics

    return train_step


def mean_gradient(
    loss_of: Callable, params: PyTree, frozen: PyTree, rest: PyTree, batch: Batch, key: Array
) -> tuple[PyTree, Scalars, PyTree]:
    """Returns gradient and metrics, each the mean over the microbatches, and ``rest`` after the last microbatch.

    Args:
      loss_of: function of (params, frozen, rest, microbatch, key) that returns the loss and (metrics, rest).
      batch: arrays whose first axis counts the microbatches; they are processed one after the other.
    """
    gradient = jax.grad(loss_of, has_aux=True)
    parts = len(next(iter(batch.values())))
    if parts == 1:
        grads, (metrics, rest) = gradient(params, frozen, rest, jax.tree.map(lambda rows: rows[0], batch), key)
        return grads, metrics, rest

    def work_off(carry: tuple[PyTree, PyTree], part: tuple[Batch, Array]):
        rest, total = carry
        grads, (metrics, rest) = gradient(params, frozen, rest, *part)
        return (rest, jax.tree.map(jnp.add, total, grads)), metrics

    start = rest, jax.tree.map(jnp.zeros_like, params)
    (rest, total), metrics = jax.lax.scan(work_off, start, (batch, jax.random.split(key, parts)))
    return jax.tree.map(lambda grad: grad / parts, total), jax.tree.map(jnp.mean, metrics), rest


def make_evaluation(
    task: Task, graph: nnx.GraphDef, frozen: PyTree, config: TrainConfig, mesh: Mesh
) -> Callable[[TrainState], tuple[dict[str, float], SampleImages]]:
    """Returns a function from a state to its held-out metrics ("eval/name") and its sample images."""
    batches, draw_samples = list(task.eval_batches(config.batch_size // config.accumulate)), task.sample_callback(mesh)

    @jax.jit
    def metrics_of(params: PyTree, frozen: PyTree, rest: PyTree, batch: Batch) -> Scalars:
        return task.eval_metrics(nnx.merge(graph, params, frozen, rest), batch)

    def evaluate(state: TrainState) -> tuple[dict[str, float], SampleImages]:
        params = cast(averaged_params(state), config.compute_dtype)
        with jax.set_mesh(mesh):
            means = mean_over_examples(
                lambda batch: metrics_of(params, frozen, state.rest, put_whole_batch(batch, mesh)), batches
            )
        means = {f"eval/{name}": value for name, value in means.items()}
        return means, draw_samples(nnx.merge(graph, params, frozen, state.rest))

    return evaluate


def mean_over_examples(metrics_of: Callable[[Batch], Scalars], batches: Iterable[Batch]) -> dict[str, float]:
    """Returns means over all examples; ``metrics_of`` returns the means over one batch's examples."""
    totals: dict[str, float] = {}
    examples = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        totals = {name: totals.get(name, 0.0) + rows * float(value) for name, value in metrics_of(batch).items()}
        examples += rows
    return {name: total / examples for name, total in totals.items()}


def export(task: Task, model: nnx.Module, directory: Path, run: dict[str, Any], replace: bool = False) -> None:
    """Writes the task's export into ``directory``, atomically: the directory is complete or absent.

    Args:
      replace: replace an existing directory, as a whole.
    """
    model = _on_host(model)
    if jax.process_index() == 0:
        with atomic_folder(directory, "an export", replace) as temporary:
            task.export(model, temporary, run)
    multihost_utils.sync_global_devices("export")


def _on_host(model: nnx.Module) -> nnx.Module:
    """Returns the model with its arrays on the host of the first process; they leave the devices one by one.

    All processes take part. The others keep nothing.
    """

    def taken(leaf: jax.Array) -> np.ndarray | jax.Array | None:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        array = fetched(leaf)
        return None if jax.process_index() else array

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(taken, state))


def origin(workdir: Path, config: TrainConfig, step: int) -> dict[str, Any]:
    """Returns the origin of the weights of this step: command, step, training_minutes, config."""
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "step": step,
        "training_minutes": round(training_minutes(workdir, step), 1),
        "config": dataclasses.asdict(config),
    }


def leave(step: int) -> NoReturn:
    """Ends the program after the save, and prints how to continue."""
    if signals.received() == signal.SIGINT:
        raise signals.Stop(signal.SIGINT)
    print(f"\nstopped and saved at step {step}; run the same command again to continue", file=sys.stderr)
    sys.exit(0)
