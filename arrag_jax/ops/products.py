"""Products summed in float32 whatever their inputs are, forward and backward.

On accelerators this is how low-precision products are summed anyway. XLA's CPU product of bfloat16 takes two to seven
times as long when bfloat16 results are asked of it (docs/LOG.md, 2026-11-24), and gradients of float32 results would
meet bfloat16 inputs in products of mixed precision. So a gradient is rounded to the inputs' type first, as it is where
the forward pass rounds.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_ROWS = 32  # up to so many, a CPU's time goes into reading the weight
LARGE_WEIGHT = 2**20  # numbers; smaller ones stay in a CPU's cache
CORES = os.cpu_count() or 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``jnp.einsum`` of two arrays of one type with a float32 result; reverse-mode derivatives only.

    Args:
      subscripts: explicit; every index of an input is in the other or in the result, none twice in one.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def linear(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    """x times the weight's transpose, of one type, with a float32 result.

    A row of the weight is what one output needs, so that a step of decoding reads it from end to end. There XLA's CPU
    product gets by on half of the memory's bandwidth, but on nearly all of it part by part (docs/LOG.md, 2026-11-25).
    """
    few = x.size <= FEW_ROWS * x.shape[-1] and weight.size >= LARGE_WEIGHT
    return jax.lax.platform_dependent(x, weight, cpu=_few_rows, default=_whole) if few else _whole(x, weight)


def _whole(x: Array, weight: Array) -> Array:
    return einsum("...i,oi->...o", x, weight)


def _few_rows(x: Array, weight: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        parts = next(n for n in range(CORES, 0, -1) if len(weight) % n == 0)
        rows = jnp.broadcast_to(rows, (parts, *rows.shape))
        y = einsum("noi,nri->nor", weight.reshape(parts, -1, x.shape[-1]), rows).reshape(len(weight), -1).T
    else:  # a single row of bfloat16 takes ten times as long as two
        y = _whole(jnp.broadcast_to(rows, (max(2, len(rows)), x.shape[-1])), weight)[: len(rows)]
    return y.reshape(*x.shape[:-1], -1)


def _forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum(subscripts, a, b), (a, b)


def _backward(subscripts: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = inputs
    left, right, out = subscripts.replace("->", ",").split(",")
    to_a = einsum(f"{out},{right}->{left}", gradient.astype(b.dtype), b)
    to_b = einsum(f"{left},{out}->{right}", a, gradient.astype(a.dtype))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


einsum.defvjp(_forward, _backward)
