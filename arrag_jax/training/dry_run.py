"""The training step of a config, compiled for a TPU topology with shapes instead of weights and data."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from arrag_jax.config import TrainConfig
from arrag_jax.mesh import BATCH, check_batch_size
from arrag_jax.parsing import parse
from arrag_jax.topology import Program, Topology, held_bytes
from arrag_jax.training.loop import make_train_step
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.tasks import STEPS, TASKS


def training_program(config: TrainConfig, topology: Topology) -> Program:
    """Returns the program of one training step.

    A model that the config names need not exist: see ``models.checkpoint.shape_of``. The vocabulary of a prior that is
    trained from scratch is then unknown and counts as empty.

    Raises:
      UserError: if the mesh or the batch does not fit the topology, or the shape of a model is unknown.
    """
    mesh = topology.mesh(config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    step = STEPS[config.task](config, parse(TASKS[config.task][1], config.options, "config.options"))
    optimizer = make_optimizer(config.optimizer, config.steps)
    graph, frozen, state = init_state(step, optimizer, config, mesh, step.shapes())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    rows = (config.accumulate, config.batch_size // config.accumulate)
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, P(None, *BATCH)))
        for name, leaf in step.example().items()
    }
    train_step = make_train_step(step, graph, optimizer, config, shardings)

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return train_step.lower(state, frozen, batch)

    held = {
        "parameters": held_bytes((state.params, state.rest, frozen)),
        "moving average": held_bytes(state.ema),
        "optimizer": held_bytes(state.optimizer),
        "batch": held_bytes(batch),
    }
    images = config.batch_size // mesh.size
    return Program(f"a training step of {images} images per chip on {topology.name}", lower, held)
