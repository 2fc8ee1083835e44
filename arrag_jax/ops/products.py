"""Computes matrix products whose sums are float32 for every input type, in the forward and the backward pass.

Accelerators sum low-precision products in float32 anyway. On a CPU, XLA's bfloat16 product takes two to seven times
longer if the result is bfloat16, too (docs/LOG.md, 2026-11-24). The gradient of a float32 result is float32, and its
product with a bfloat16 input would have mixed precision. So the gradient is first rounded to the type of the inputs, as
it would be if the forward pass rounded its result.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_ROWS = 32  # up to this number of rows, a CPU spends its time on reading the weight
LARGE_WEIGHT = 2**20  # elements; a smaller weight stays in a CPU's cache
CORES = os.cpu_count() or 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``jnp.einsum`` of two arrays of the same type as float32; supports only reverse-mode derivatives.

    Args:
      subscripts: in explicit form ("->"). Every index of an input must also be in the other input or in the result, and
        no index may occur twice in one array.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def linear(x: Float[Array, "*rows I"], weight: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    """Returns x times the transpose of the weight as float32; both have the same type.

    The weight is [out, in], so one output needs one contiguous row, and a decoding step reads the weight sequentially.
    For few rows of x, XLA's CPU product uses half of the memory bandwidth. Split into parts, it uses nearly all of it
    (docs/LOG.md, 2026-11-25).
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
    else:  # a single row of bfloat16 takes ten times longer than two rows
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
