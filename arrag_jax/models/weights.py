"""Reads a model's weights from files and writes them; one error reports every missing, unknown and mis-shaped key."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arrag_jax.checksums import all_finite
from arrag_jax.errors import UserError
from arrag_jax.mesh import put_parameter
from arrag_jax.models.layouts import Layout, published_shape, to_ours, to_published
from arrag_jax.models.tensor_files import Stored, read_tensors, write_tensors
from arrag_jax.nn.linear import quantized
from arrag_jax.nn.variables import Statistic

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def parameters(model: Any) -> dict[str, nnx.Variable]:
    """Returns a model's parameters by dotted path, without what only training uses (``Statistic``)."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): value for path, value in flat if not isinstance(value, Statistic)}


def match(model: nnx.Module, stored: dict[str, Stored], layout: Layout, directory: Path) -> dict[str, Stored]:
    """Returns the path of each of a model's parameters → its tensor on disk.

    Args:
      model: may be abstract and may lack parts; the keys of parts that it lacks are ignored.
      stored: key in the layout → tensor.
      directory: the folder, for the message.

    Raises:
      UserError: if keys are missing, unknown or mis-shaped; the message lists them all, one per line.
    """
    wanted = {layout.key(path): path for path in parameters(model)}
    passed = tuple(prefix for part, prefix in layout.parts.items() if getattr(model, part) is None)
    problems = [f"missing {key}" for key in sorted(set(wanted) - set(stored))]
    for key in sorted(set(stored) - set(wanted)):
        if not layout.unused.fullmatch(key) and not key.startswith(passed):
            problems.append(f"unknown {key}")
    for path, value in sorted(parameters(model).items()):
        tensor = stored.get(layout.key(path))
        expected = published_shape(value.shape, path)
        if tensor is not None and tensor.shape != expected:
            problems.append(f"{layout.key(path)} has shape {tensor.shape}, its config asks for {expected}")
        elif tensor is not None and tensor.dtype not in (*DTYPES, "float64"):
            problems.append(f"{layout.key(path)} has dtype {tensor.dtype}, which is no dtype of weights")
    if any(problem.startswith("unknown ") and ".lora_" in problem for problem in problems):
        problems.append("(tensors of a LoRA need an adapter_config.json beside them, with r and lora_alpha)")
    if problems:
        raise UserError("\n  ".join([f"{directory} does not hold the model of its config.json:", *problems]))
    return {path: stored[key] for key, path in wanted.items()}


def read_weights(
    model: nnx.Module, matched: dict[str, Stored], dtype: str, exact: tuple[str, ...], mesh: Mesh | None = None
) -> None:
    """Fills a model, tensor by tensor; only the model and one tensor are in memory at a time.

    Weights whose variables are int8 are quantised from the numbers in the file, and their scales set.

    Args:
      model: an abstract model (``nn.abstract``), whose parameters are set in ``dtype``.
      matched: the result of ``match``.
      exact: parts that are read in float32 (``Layout.exact``).
      mesh: each device gets its share of a tensor alone (``mesh.partition_spec``); None = one device gets them all.

    Raises:
      UserError: if a tensor is damaged, or has values that are not finite in the file or in ``dtype``.
    """
    variables = parameters(model)
    # Largest first, because reading needs temporary memory of a tensor's size, and less of the model is loaded then.
    largest_first = sorted(matched.items(), key=lambda item: (-item[1].nbytes, item[0]))
    for path, value in read_tensors(dict(largest_first)):
        with np.errstate(over="ignore"):  # overflow is reported below
            held = variables[path].dtype == jnp.int8
            ours: Any = np.ascontiguousarray(to_ours(value, path), np.float32 if held else _kept(path, dtype, exact))
        if not all_finite(ours):
            require_finite(value, matched[path])
            what = f"{matched[path].name} in {matched[path].file}"
            raise UserError(f"{what} has numbers too large for {dtype}; choose dtype float32 or bfloat16")
        if held:
            ours, scale = quantized(ours)
            beside = path.removesuffix("weight") + "scale"
            variables[beside].set_value(put_parameter(beside, scale, mesh))
        ours = put_parameter(path, ours, mesh)
        variables[path].set_value(ours.block_until_ready())  # an unfinished copy keeps its source in memory


def require_finite(value: np.ndarray, tensor: Stored) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    if not all_finite(value):
        raise UserError(
            f"{tensor.name} in {tensor.file} holds NaN or infinite numbers; copy the checkpoint again, or train it anew"
        )


def write_weights(model: nnx.Module, path: Path, dtype: str, layout: Layout) -> None:
    """Writes a model's parameters to one file under a layout's keys, in ``dtype`` or, for exact parts, in float32."""
    tensors = {}
    for name, value in parameters(model).items():
        kept = np.asarray(value[...].astype(_kept(name, dtype, layout.exact)))
        tensors[layout.key(name)] = to_published(kept, name)
    write_tensors(tensors, path)


def set_dtypes(model: nnx.Module, dtype: str, exact: tuple[str, ...]) -> None:
    """Gives an abstract model's parameters the dtypes that ``read_weights`` would give them, in place."""
    for path, value in parameters(model).items():
        value.set_value(jax.ShapeDtypeStruct(value.shape, _kept(path, dtype, exact)))


def _kept(path: str, dtype: str, exact: tuple[str, ...]):
    """Returns the dtype of a parameter."""
    return DTYPES["float32" if path.startswith(exact) else dtype]
