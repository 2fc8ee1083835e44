"""Products summed in float32 whatever their inputs are, forward and backward.

On accelerators this is how low-precision products are summed anyway. XLA's CPU product of bfloat16 takes two to seven
times as long when bfloat16 results are asked of it (docs/LOG.md, 2026-11-24), and gradients of float32 results would
meet bfloat16 inputs in products of mixed precision. So a gradient is rounded to the inputs' type first, as it is where
the forward pass rounds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``jnp.einsum`` of two arrays of one type with a float32 result; reverse-mode derivatives only.

    Args:
      subscripts: explicit; every index of an input is in the other or in the result, none twice in one.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def linear(x: Array, matrix: Array, dimensions: Any = None, **_: Any) -> Array:
    """x [..., I] @ matrix [I, O], rounded to x's type; takes what ``nnx.Linear`` gives its ``dot_general``."""
    return einsum("...i,io->...o", x, matrix).astype(x.dtype)


def _forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(subscripts, a, b), (a, b)


def _backward(subscripts: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = inputs
    left, right, out = subscripts.replace("->", ",").split(",")
    to_a = einsum(f"{out},{right}->{left}", gradient.astype(b.dtype), b)
    to_b = einsum(f"{left},{out}->{right}", a, gradient.astype(a.dtype))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


einsum.defvjp(_forward, _backward)
