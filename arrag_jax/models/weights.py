"""Weights between files and a model, strictly: every missing, unknown and mis-shaped key is reported at once."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrag_jax.checksums import all_finite
from arrag_jax.errors import UserError
from arrag_jax.models.layouts import Layout, published_shape, to_ours, to_published
from arrag_jax.models.tensor_files import Stored, read_tensors, write_tensors
from arrag_jax.nn.vq import CodeUsage

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def parameters(model: Any) -> dict[str, nnx.Variable]:
    """A model's parameters by dotted path, bookkeeping of training left out."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): value for path, value in flat if not isinstance(value, CodeUsage)}


def match(model: nnx.Module, stored: dict[str, Stored], layout: Layout, directory: Path) -> dict[str, Stored]:
    """The tensor on disk of each of a model's parameters.

    Args:
      model: may be abstract, and may lack parts; the keys of a part that it lacks are passed over.
      stored: by the layout's keys.
      directory: for the message.

    Raises:
      UserError: with every missing, unknown and mis-shaped key, one a line.
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


def read_weights(model: nnx.Module, matched: dict[str, Stored], dtype: str, exact: tuple[str, ...]) -> None:
    """Fills a model, tensor by tensor: in memory are the model and one tensor.

    Args:
      model: built abstractly (``nnx.eval_shape``); receives its parameters in ``dtype``.
      matched: of ``match``.
      exact: parts that are read in float32 (``Layout.exact``).

    Raises:
      UserError: a tensor that is damaged, or that holds numbers which are not finite, in the file or in ``dtype``.
    """
    variables = parameters(model)
    # The largest first: what a tensor needs besides its place is then needed while little else is held.
    largest_first = sorted(matched.items(), key=lambda item: (-item[1].nbytes, item[0]))
    for path, value in read_tensors(dict(largest_first)):
        with np.errstate(over="ignore"):  # it is told below
            ours: Any = np.ascontiguousarray(to_ours(value, path), _kept(path, dtype, exact))
        if not all_finite(ours):
            require_finite(value, matched[path])
            what = f"{matched[path].name} in {matched[path].file}"
            raise UserError(f"{what} has numbers too large for {dtype}; choose dtype float32 or bfloat16")
        ours = jnp.asarray(ours)
        variables[path].set_value(ours.block_until_ready())  # copies still under way would keep their sources


def require_finite(value: np.ndarray, tensor: Stored) -> None:
    """Raises UserError where a tensor that was read holds NaN or an infinity."""
    if not all_finite(value):
        raise UserError(
            f"{tensor.name} in {tensor.file} holds NaN or infinite numbers; copy the checkpoint again, or train it anew"
        )


def write_weights(model: nnx.Module, path: Path, dtype: str, layout: Layout) -> None:
    """Writes a model's parameters under a layout's keys to one file, in ``dtype`` but for the layout's exact parts."""
    tensors = {}
    for name, value in parameters(model).items():
        kept = np.asarray(value[...].astype(_kept(name, dtype, layout.exact)))
        tensors[layout.key(name)] = to_published(kept, name)
    write_tensors(tensors, path)


def _kept(path: str, dtype: str, exact: tuple[str, ...]):
    """The dtype in which a parameter is held."""
    return DTYPES["float32" if path.startswith(exact) else dtype]
