"""Checks that models, policies, searches and sampling settings fit together, before anything is compiled."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from arrag_jax.config import SamplingConfig
from arrag_jax.errors import UserError
from arrag_jax.interfaces import (
    AnyRetriever,
    ArrayLike,
    Backbone,
    DecodePolicy,
    StatefulBackbone,
    StateRetriever,
    WindowBackbone,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cfg_scale", "cfg_interval", "temperature", "top_p"),
    meta_fields=("top_k", "greedy", "window", "max_copied_cells"),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """A checked ``SamplingConfig`` as the compiled loop takes it: another guidance needs no other program."""

    cfg_scale: Any
    cfg_interval: Any
    temperature: Any
    top_k: int | None
    top_p: Any
    greedy: bool
    window: int
    max_copied_cells: int | None


WHOLE = ("top_k", "window", "cfg_interval", "max_copied_cells")  # settings that are whole numbers


def require_blenders(model: Backbone, retriever: AnyRetriever, neighbors: int | None = None) -> None:
    """Raises UserError unless the model has blenders and the search returns enough neighbours for them.

    Args:
      neighbors: how many neighbours are blended; None = the model's own number.
    """
    blended = getattr(model, "blended_neighbors", 0)
    if not blended:
        raise UserError("this checkpoint has no FAiD blenders; decode it with --method plain or daid")
    wanted = blended if neighbors is None else neighbors
    if not 1 <= wanted <= retriever.k:
        raise UserError(f"FAiD blends {wanted} neighbours, the search gives k={retriever.k}; raise k")


def require_states(model: Backbone) -> None:
    """Raises UserError unless the model can work with a search by the backbone's state."""
    if not isinstance(model, StatefulBackbone):
        raise UserError(f"{type(model).__name__} does not give its states, so hidden keys cannot be searched with it")


def _number(name: str, value: Any) -> Any:
    """Returns a number of any library as a Python number, which can be hashed; None stays None."""
    try:
        return value if value is None else operator.index(value) if name in WHOLE else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} = {value!r} must be one number") from error


def sampling_of(model: Backbone, numbers: dict[str, Any], greedy: bool) -> Sampling:
    """Returns the settings of ``sample``, checked as ``SamplingConfig`` checks them.

    Raises:
      UserError: if a setting is invalid.
    """
    sampling = SamplingConfig(**{name: _number(name, value) for name, value in numbers.items()}, greedy=greedy)
    if sampling.top_k is not None and sampling.top_k > model.codebook_size:
        raise UserError(f"top_k = {sampling.top_k} is more than the {model.codebook_size} codes there are")
    positions = model.grid[0] * model.grid[1]
    if sampling.window > positions:
        raise UserError(f"window = {sampling.window} is more than the {positions} positions of the grid")
    if sampling.window > 1 and not isinstance(model, WindowBackbone):
        raise UserError(f"{type(model).__name__} runs one position per pass; draw with window=1")
    return Sampling(**dataclasses.asdict(sampling))


def known_codes(model: Backbone, known: ArrayLike, batch: int) -> Int[Array, "B T"]:
    """Returns the known codes of a batch, -1 where a code is to be drawn, as a device array.

    Raises:
      UserError: if they are not codes of B grids.
    """
    codes, shape = np.asarray(known), (batch, model.grid[0] * model.grid[1])
    if codes.shape != shape or not np.issubdtype(codes.dtype, np.integer):
        raise UserError(f"known must be whole numbers {list(shape)}, got {codes.dtype} {list(codes.shape)}")
    if codes.min(initial=-1) < -1 or codes.max(initial=-1) >= model.codebook_size:
        raise UserError(f"known must hold codes below {model.codebook_size}, and -1 where a code is drawn")
    return jnp.asarray(codes, jnp.int32)


def require_fit(model: Backbone, policy: DecodePolicy, retriever: AnyRetriever | None) -> None:
    """Raises UserError unless the model and the search give what the policy needs."""
    if policy.uses_retrieval and retriever is None:
        raise UserError(f"{type(policy).__name__} needs a retriever: build a datastore, or draw with --method plain")
    if policy.uses_retrieval and isinstance(retriever, StateRetriever):
        require_states(model)
    if policy.blends and retriever is not None:
        require_blenders(model, retriever, getattr(policy, "neighbors", None))
