"""Computes squared distances whose bits do not depend on the library, the device or the batch.

A sum of floating-point products depends on the order of summation, which a compiler chooses by batch, shape and device.
The functions here sum integers instead, which is exact in any order. For this, numbers are rounded to multiples of
2^-22. This changes a distance by no more than the rounding errors of a float32 sum. So NumPy and XLA give equal bits,
for a single query and in a batch, and equal vectors have distance 0.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BITS = 22  # numbers are rounded to multiples of 2^-BITS
LOW = 11  # bits in the low half of a difference; sums of up to 1024 products of halves then fit into int32


def rounded(vectors: Float[np.ndarray, "*dims C"]) -> Float[np.ndarray, "*dims C"]:
    """Returns vectors in units of 2^-22, as float32 that holds whole numbers; the input must lie between -2 and 2."""
    return np.rint(np.asarray(vectors, np.float32) * np.float32(2.0**BITS))


def host_distances(query: Float[np.ndarray, "n E"], key: Float[np.ndarray, "n m E"]) -> Float[np.ndarray, "n m"]:
    """Returns the squared L2 distances of queries and their keys as float32, computed in NumPy.

    The result has the same bits as that of ``squared_distances``.

    Args:
      query, key: values between -1 and 1; E is at most 1024.
    """
    apart = (rounded(key) - rounded(query)[:, None]).astype(np.float64)  # whole numbers below 2^24
    total = np.einsum("nme,nme->nm", apart, apart).astype(np.int64)  # below 2^53, so exact
    high, low = (total >> 2 * LOW).astype(np.float32), (total & (4**LOW - 1)).astype(np.float32)
    return high * np.float32(2.0 ** (2 * LOW - 2 * BITS)) + low * np.float32(2.0 ** (-2 * BITS))


def squared_distances(query: Float[Array, "... E"], key: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Returns squared L2 distances as float32, computed in XLA.

    The arguments broadcast. Their limits and the bits of the result are those of ``host_distances``.
    """
    return in_float(*exact_squares(query, key))


def exact_squares(
    query: Float[Array, "... E"], key: Float[Array, "... E"]
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Returns squared L2 distances without rounding, as two numbers: high · 2^22 + low, with low below 2^22."""
    units = (jnp.round(x.astype(jnp.float32) * 2.0**BITS).astype(jnp.int32) for x in (query, key))
    apart = next(units) - next(units)
    high = (apart + 2 ** (LOW - 1)) >> LOW
    low = apart - (high << LOW)  # between -2^10 and 2^10
    squares, mixed, rest = (high * high).sum(-1), (high * low).sum(-1), (low * low).sum(-1)
    # The total is squares · 2^22 + mixed · 2^12 + rest. Multiples of 2^22 in the last two terms are carried.
    rest = rest + ((mixed & 1023) << (LOW + 1))
    return squares + (mixed >> (LOW - 1)) + (rest >> 2 * LOW), rest & (4**LOW - 1)


def in_float(high: Int[Array, "..."], low: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 of such numbers, or of sums of a few of them: that of the distance of all parts together."""
    high, low = high + (low >> 2 * LOW), low & (4**LOW - 1)
    scale = 2.0 ** (2 * LOW - 2 * BITS), 2.0 ** (-2 * BITS)
    # Products with powers of two are exact, so a fused multiply-add gives the same bits.
    return high.astype(jnp.float32) * scale[0] + low.astype(jnp.float32) * scale[1]


def score_error(numbers: int, parts: int) -> float:
    """Returns a bound on the difference between 2·parts − 2·q·k and ``squared_distances``.

    The product q·k is summed in float32 in any order.

    Args:
      numbers: E, the dimension of queries and keys.
      parts: number of parts of a query or key; each part has unit norm, up to float32's rounding.
    """
    unit = 2.0**-24
    summed = 2 * numbers * unit * parts  # the absolute values of the products sum to at most ``parts``
    norms = 2 * parts * (numbers / parts + 6) * unit  # error of both norms, which are rounded
    grid = 4 * parts**0.5 * numbers**0.5 * 2.0**-BITS  # the square root of the largest distance is 2·sqrt(parts)
    return summed + norms + grid + 4 * parts * unit
