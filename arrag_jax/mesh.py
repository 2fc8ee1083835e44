"""The device mesh: its two axes, where each parameter lives, and the start-up of several processes.

Axes: the batch is split over "data" and "fsdp" together; large parameters (and their optimizer
state) are split over "fsdp" and gathered by XLA where they are used. One device is the mesh 1 x 1.
"""

import atexit
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from arrag_jax import signals
from arrag_jax.config import MeshConfig
from arrag_jax.errors import UserError

BATCH = P(("data", "fsdp"))

# The first rule whose pattern is found in a leaf's path ("params/layers/0/mlp/up/kernel") and whose
# split fits its shape wins. Optimizer state repeats the path of its parameter and so follows it.
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (r"codebook", P()),  # small, and read whole by every search
    (r"embed\w*/embedding$", P(None, "fsdp")),  # rows are gathered by id: split the width instead
)
SMALLEST_SHARDED = 2**16  # elements; below it a gather costs more than the copies


PATIENCE = 40  # seconds after which a process that is not heard of counts as dead, and all others end


def start_distributed(patience: int = PATIENCE) -> None:
    """Joins the processes of a multi-host run; does nothing in a run of one process.

    Called before anything else touches jax. A run has several processes where JAX_COORDINATOR_ADDRESS
    is set (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), or where SLURM, Open MPI or a TPU pod says so.
    When one of them dies, jax ends the others after ``patience`` seconds, and their last line says so.
    """
    env = os.environ
    seconds = {"heartbeat_timeout_seconds": patience, "shutdown_timeout_seconds": patience}
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            place = env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except KeyError as error:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is set, so {error.args[0]} must be set too") from error
        _watch_over_this_process()
        jax.distributed.initialize(*place, **seconds)
        signals.together(multihost_utils.reached_preemption_sync_point)
    elif (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    ):
        _watch_over_this_process()
        jax.distributed.initialize(**seconds)  # finds the coordinator from the cluster's own variables
        signals.together(multihost_utils.reached_preemption_sync_point)


def _watch_over_this_process() -> None:
    """Lets another process say why this one is gone, should it end without a word of its own.

    jax ends a process whose peer has died from a thread in C++, after which no line of Python runs.
    """
    line = (
        "error: this process ended before its work was done, because it was killed or because another process of the "
        "run died (its own output says why); start all processes again with the same command to continue"
    )
    program = f"import sys; sys.stdin.read() or print({line!r}, file=sys.stderr)"
    watcher = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, start_new_session=True)

    def end() -> None:
        jax.distributed.shutdown()  # waits for the others; does not return where one of them is dead
        watcher.communicate(b"ended by itself")

    atexit.register(end)
    signals.before_the_end(lambda: watcher.communicate(b"ended by itself"))


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh of axes ("data", "fsdp"). One process may use fewer devices than it has; several use all.

    Raises:
      UserError: where the devices at hand do not fill the shape asked for.
    """
    devices = jax.devices()
    shape = {"data": config.data, "fsdp": config.fsdp}
    free = [name for name, size in shape.items() if size == -1]
    taken = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or taken < 1:
        raise UserError(f"mesh {shape}: sizes must be positive, and at most one may be -1 (every device left)")
    for name in free:
        shape[name] = len(devices) // taken
    size = shape["data"] * shape["fsdp"]
    if size == 0 or size > len(devices) or len(devices) % taken or (jax.process_count() > 1 and size != len(devices)):
        raise UserError(f"mesh {shape} does not fit {len(devices)} devices; change config.mesh")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * 2, devices=devices[:size])


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless each of the global batch's microbatches splits evenly over the mesh's devices."""
    if batch_size % (mesh.size * accumulate):
        times = f" times accumulate={accumulate}" if accumulate > 1 else ""
        raise UserError(f"batch_size={batch_size} must be a multiple of the mesh's {mesh.size} devices{times}")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where one leaf lives: by rule, else its largest axis that divides over "fsdp", else everywhere."""
    ways = mesh.shape["fsdp"]
    if ways == 1 or len(shape) < 2 or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    for pattern, spec in SHARDING_RULES:
        split = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        if re.search(pattern, path) and all(axis < len(shape) and shape[axis] % ways == 0 for axis in split):
            return spec
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % ways == 0:
            return P(*(["fsdp" if i == axis else None for i in range(len(shape))]))
    return P()


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for every leaf of a state (arrays or their shapes), by ``partition_spec``."""

    def sharding(path, leaf):
        return NamedSharding(
            mesh, partition_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)
        )

    return jax.tree_util.tree_map_with_path(sharding, state)


def put_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Lays a state that every process holds whole out over the mesh."""
    return jax.tree.map(_put, state, state_shardings(state, mesh))


def put_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Splits the rows of arrays that every process holds whole over "data"; whoever is beside it there has the same."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P("data"))), tree)


def _put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(leaf, sharding)
    data = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)  # several processes cannot put keys
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, accumulate: int = 1) -> dict[str, jax.Array]:
    """Assembles the global batch from each process's own share of its rows.

    Returns:
      Arrays [accumulate, B / accumulate, ...]: the microbatches, every one split over all devices, so that
      a device works off rows which are its own from the start.
    """
    sharding = NamedSharding(mesh, P(None, *BATCH))

    def place(rows: np.ndarray) -> jax.Array:
        parts = rows.reshape(accumulate, len(rows) // accumulate, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, parts)

    return {name: place(np.asarray(rows)) for name, rows in batch.items()}


def put_whole_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch that every process holds whole: split over all devices where its rows divide evenly."""
    rows = {len(values) for values in batch.values()}
    spec = BATCH if all(count % mesh.size == 0 for count in rows) else P()
    return jax.device_put(dict(batch), NamedSharding(mesh, spec))


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole on every device: gathers what is sharded, copies what lies on one device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
