"""Creates the device mesh and places parameters and batches on it.

The mesh has two axes. A batch is split over "data" and "fsdp" together. Large parameters and their optimizer state are
split over "fsdp", and XLA gathers them when they are used. A single device is the mesh 1 x 1.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from arrag_jax.config import MeshConfig
from arrag_jax.errors import UserError
from arrag_jax.processes import PATIENCE as PATIENCE
from arrag_jax.processes import start_distributed as start_distributed

BATCH = P(("data", "fsdp"))

# The first rule applies whose pattern occurs in a leaf's path ("params/layers/0/mlp/up/kernel") and whose split fits
# the leaf's shape. Optimizer state is placed like its parameter, because its path contains the parameter's path.
SHARDING_RULES: tuple[tuple[str, P], ...] = (
    (r"codebook", P()),  # it is small, and every search reads all of it
    (r"embed\w*/embedding$", P(None, "fsdp")),  # splits the width, because rows are gathered by id
)
SMALLEST_SHARDED = 2**16  # elements; replicating a smaller leaf costs less than gathering it


def make_mesh(config: MeshConfig, alone: bool = False, devices: Sequence[Any] = ()) -> Mesh:
    """Returns a mesh with the axes ("data", "fsdp").

    A single process can use fewer devices than it has. Several processes use all their devices.

    Args:
      config: the shape.
      alone: this process's devices are meshed as if there were no other process.
      devices: devices of another machine to compile for (``topology``); () = those of this run.

    Raises:
      UserError: if the shape is not valid, or the devices do not fit it.
    """
    whole_run = jax.process_count() > 1 and not alone
    devices = devices or (jax.local_devices() if alone else jax.devices())
    shape = {"data": config.data, "fsdp": config.fsdp}
    free = [name for name, size in shape.items() if size == -1]
    taken = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or taken < 1:
        raise UserError(f"mesh {shape}: sizes must be positive, and at most one may be -1 (every device left)")
    for name in free:
        shape[name] = len(devices) // taken
    size = shape["data"] * shape["fsdp"]
    if size == 0 or size > len(devices) or len(devices) % taken or (whole_run and size != len(devices)):
        raise UserError(f"mesh {shape} does not fit {len(devices)} devices; change config.mesh")
    used = list(devices)[:size]
    slices = len({getattr(device, "slice_index", 0) for device in used}) if used[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * 2, devices=used)
    # Between slices there is only the network of the data centre: parameters stay split within a slice.
    if shape["data"] % slices:
        raise UserError(f"mesh {shape}: data must be a multiple of the {slices} slices; change config.mesh")
    within = (shape["data"] // slices, shape["fsdp"])
    arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1), used)
    return Mesh(arranged, tuple(shape), axis_types=(AxisType.Auto,) * 2)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless each microbatch of the global batch splits evenly over the devices of the mesh."""
    if batch_size % (mesh.size * accumulate):
        times = f" times accumulate={accumulate}" if accumulate > 1 else ""
        raise UserError(f"batch_size={batch_size} must be a multiple of the mesh's {mesh.size} devices{times}")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns how one leaf is split over the mesh.

    A rule of ``SHARDING_RULES`` comes first. Without one, the largest axis that "fsdp" divides is split. Otherwise, and
    if the leaf is small or has fewer than two axes, the leaf is replicated.
    """
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
    """Returns a NamedSharding from ``partition_spec`` for every leaf of a state of arrays or of their shapes."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")  # of an nnx.Variable
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_state(state: PyTree, mesh: Mesh, spec: P | None = None) -> PyTree:
    """Returns the shapes of a state with their shardings: those of ``state_shardings``, or one for all leaves."""
    shardings = (
        state_shardings(state, mesh) if spec is None else jax.tree.map(lambda _: NamedSharding(mesh, spec), state)
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def put_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Places a state on the mesh by ``state_shardings``; every process must hold the complete state."""
    return jax.tree.map(_put, state, state_shardings(state, mesh))


def put_parameter(path: str, value: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Returns a parameter on the mesh, laid out by ``partition_spec``; each device receives its own share alone.

    Args:
      path: dotted path in the model.
      value: the complete parameter, which every process must hold.
      mesh: None = the default device.
    """
    if mesh is None:
        return jnp.asarray(value)
    return _shares(value, NamedSharding(mesh, partition_spec(path.replace(".", "/"), value.shape, mesh)))


def fetched(array: Any) -> np.ndarray:
    """Returns an array on the host of every process; every process must call this together with the others."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)  # as everything that ``partition_spec`` lays out
        array = jax.device_put(array, NamedSharding(sharding.mesh, P())).addressable_data(0)
    return np.asarray(array)


def put_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Splits the rows of arrays over "data"; replicated along "fsdp". Every process must hold all rows."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P("data"))), tree)


def _put(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process holds, or that lies on the mesh already; the latter is not copied in vain."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # key arrays fail in several processes
        data = _put(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    on_mesh = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if on_mesh or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return _shares(np.asarray(leaf), sharding)  # device_put sends nothing from one process's devices to another's


def _shares(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Gives each device of this process its own share of an array that every process holds."""
    return jax.make_array_from_callback(value.shape, sharding, lambda place: value[place])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, accumulate: int = 1) -> dict[str, jax.Array]:
    """Returns the global batch, assembled from the rows that each process holds.

    Returns:
      Arrays [accumulate, B / accumulate, ...]: the microbatches. Each one is split over all devices, so no rows move
      between devices.
    """
    sharding = NamedSharding(mesh, P(None, *BATCH))

    def place(rows: np.ndarray) -> jax.Array:
        parts = rows.reshape(accumulate, len(rows) // accumulate, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, parts)

    return {name: place(np.asarray(rows)) for name, rows in batch.items()}


def put_whole_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a batch that every process holds completely.

    The batch is split over all devices if its rows divide evenly, else it is replicated.
    """
    rows = {len(values) for values in batch.values()}
    spec = BATCH if all(count % mesh.size == 0 for count in rows) else P()
    return jax.device_put(dict(batch), NamedSharding(mesh, spec))


def compiler_options(shardings: PyTree) -> dict[str, str]:
    """Returns compiler options for a training step whose state has these shardings.

    On a TPU, XLA turns the gathering of a weight and its product into a loop over the devices' shares, which reads and
    writes the product's sum once per share. With large batches that costs more than it hides, so it is turned off.
    """
    meshes = [leaf.mesh for leaf in jax.tree.leaves(shardings) if isinstance(leaf, NamedSharding)]
    on_tpus = bool(meshes) and meshes[0].size > 1 and meshes[0].devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if on_tpus else {}


def context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Returns the context in which programs for a mesh are traced: ``split_rows`` and ``on_own_rows`` ask for it."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def devices_in_context() -> int:
    """Returns how many devices share the rows of a batch in the program that is being traced."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def split_rows(x: jax.Array) -> jax.Array:
    """Returns an array of a program, its rows split over all devices of the mesh in context (``jax.set_mesh``).

    Without this, XLA may split other axes of hidden states instead, like the weights that they meet. An array whose
    rows do not divide evenly stays as it is, and so does every array where there is no mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(x) % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def shares_of(length: int) -> int:
    """Returns over how many devices an axis of this length is split like the parameters of the program's mesh."""
    ways = dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1)
    return ways if length % ways == 0 else 1


def split_axis(x: jax.Array, axis: int) -> jax.Array:
    """Returns an array of a program, split along one axis over "fsdp" like the large parameters.

    Without this, XLA may compute a product of parameters whole on every device. An array whose axis does not divide
    evenly stays as it is, and so does every array where there is no mesh.
    """
    if shares_of(x.shape[axis]) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*("fsdp" if i == axis else None for i in range(x.ndim))))


GATHERED = "gathered"  # what ``jax.checkpoint`` knows the results of ``gathered`` by


def gathered(x: jax.Array) -> jax.Array:
    """Returns an array of a program, whole on every device.

    Slices of it then need no messages. And XLA does not turn its gathering and a product into a loop over shares, which
    reads and writes the product once per share. The gradient is laid out as XLA chooses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else checkpoint_name(_gathered(x), GATHERED)


@jax.custom_vjp
def _gathered(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P())


_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, gradient: (gradient,))


def on_own_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Returns ``function(*arrays)`` computed by every device on its own rows.

    XLA cannot split a hand-written kernel. Rows that do not divide evenly are computed on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    spec = P() if len(arrays[0]) % mesh.size else BATCH
    return jax.shard_map(function, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


def on_own_device(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays that lie on the mesh as arrays on one device of each process, whole."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), put_everywhere(tree, mesh))


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Replicates every leaf on every device; gathers leaves that are sharded and copies those on one device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
