"""The state of a training run: how it begins, sharded from the first byte, and what of it is evaluated."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from arrag_jax.config import TrainConfig
from arrag_jax.mesh import abstract_state, state_shardings
from arrag_jax.nn.variables import Frozen
from arrag_jax.training.checkpoint import Checkpoints
from arrag_jax.training.start import params_of
from arrag_jax.training.task import Task, TaskStep


class TrainState(NamedTuple):
    """Everything that a step may change: pure dicts of arrays, keyed by the path in the model."""

    step: Int[Array, ""]  # number of finished steps
    params: PyTree  # the trainable variables, float32
    rest: PyTree  # every other variable that is not Frozen
    optimizer: PyTree
    ema: PyTree  # moving average of params; None if ema_decay is 0


def init_state(
    task: TaskStep, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh, loaded: PyTree = None
) -> tuple[nnx.GraphDef, PyTree, TrainState]:
    """Returns the model's static graph, its frozen variables and the state at step 0, laid out over the mesh.

    Args:
      loaded: what ``Task.load`` returns; None = it is called. Shapes (``jax.ShapeDtypeStruct``) give shapes, with
        their shardings.
    """

    def start(loaded: PyTree) -> tuple[nnx.GraphDef, tuple[PyTree, TrainState]]:
        graph, params, frozen, rest = split(task.init_model(nnx.Rngs(config.seed), loaded), task.trainable)
        params = cast(params, "float32")
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        return graph, (frozen, TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params), ema))

    graph, (frozen, state) = _made(start, task.load(mesh) if loaded is None else loaded, mesh)
    return graph, frozen, state


def initial_model(task: TaskStep, config: TrainConfig, mesh: Mesh) -> Any:
    """Returns the model at step 0, laid out over the mesh."""
    return nnx.merge(
        *_made(lambda loaded: nnx.split(task.init_model(nnx.Rngs(config.seed), loaded)), task.load(mesh), mesh)
    )


def _made(build: Callable[[PyTree], tuple[nnx.GraphDef, PyTree]], loaded: PyTree, mesh: Mesh) -> tuple[Any, Any]:
    """Returns ``build(loaded)``, whose arrays are laid out over the mesh; it takes over the arrays of ``loaded``.

    All is computed in one program whose outputs are the devices' shares, so that no device holds more than its share.
    """
    graphs: list[nnx.GraphDef] = []

    def arrays(loaded: PyTree) -> PyTree:
        graph, made = build(loaded)
        graphs.append(graph)
        return made

    shapes = jax.eval_shape(arrays, loaded)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(loaded)):
        made = abstract_state(shapes, mesh)
    else:
        with warnings.catch_warnings():  # a parameter that changes its dtype cannot take over its old memory
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            made = jax.jit(arrays, out_shardings=state_shardings(shapes, mesh), donate_argnums=0)(loaded)
    return graphs[0], made


def resume_or_start(
    state: TrainState, data: grain.DatasetIterator, checkpoints: Checkpoints, task: Task, config: TrainConfig
) -> TrainState:
    """Returns the state of the run's newest checkpoint, else a state from ``init_from``, else ``state`` itself.

    Prints on stderr which of the three it is.
    """
    resumed = checkpoints.restore(state, data)
    if resumed is not None:
        state, words = resumed, f"continuing at step {int(resumed.step)}"
    elif config.init_from:
        params, words = params_of(config.init_from, state.params, task.best_metric, task.vocabulary)
        state = state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None)
    else:
        words = "starting from scratch"
    if jax.process_index() == 0:
        print(words, file=sys.stderr)
    return state


def averaged_params(state: TrainState) -> PyTree:
    """Returns the parameters to evaluate and export: the moving average if there is one."""
    return state.params if state.ema is None else state.ema


def split(model: nnx.Module, trainable: type) -> tuple[nnx.GraphDef, PyTree, PyTree, PyTree]:
    """Returns the graph, and the trainable, frozen and all other variables as pure dicts."""
    graph, *states = nnx.split(model, trainable, Frozen, ...)
    params, frozen, rest = map(nnx.to_pure_dict, states)
    return graph, params, frozen, rest


def cast(params: PyTree, dtype: str) -> PyTree:
    """Returns the parameters with floating arrays cast to ``dtype``."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)
