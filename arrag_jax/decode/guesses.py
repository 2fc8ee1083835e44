"""Guesses codes that have not been drawn yet; a guess changes the number of passes, never the picture."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@runtime_checkable
class Guess(Protocol):
    """A rule for first guesses; a pytree."""

    def __call__(self, codes: Int[Array, "B T"], known: Int[Array, " B"], count: int) -> Int[Array, "B n"]:
        """Returns guesses for the ``count`` positions from ``known`` on; codes before ``known`` are given."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """Guesses the code ``back`` positions before: 1 = the code to the left, the grid's width = the code above."""

    back: int = dataclasses.field(metadata={"static": True})

    def __call__(self, codes: Int[Array, "B T"], known: Int[Array, " B"], count: int) -> Int[Array, "B n"]:
        """Returns the code ``back`` positions before each, or the last known one that repeats with this period."""
        steps = jnp.arange(count)[None]
        source = known[:, None] - self.back + steps % self.back
        return jnp.maximum(jnp.take_along_axis(codes, jnp.clip(source, 0, codes.shape[1] - 1), 1), 0)
