"""Squared distances that are the same to the bit wherever they are computed.

A sum of floating-point products depends on its order, which a compiler chooses by batch, shape and device. These
sums are of integers instead: numbers are rounded to multiples of 2^-22, which moves a distance by no more than
float32's rounding of such a sum may, and integer sums are exact in any order. So NumPy and XLA, alone or in a batch,
agree in every bit, and equal vectors are at distance 0.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BITS = 22  # numbers are rounded to multiples of 2^-BITS
LOW = 11  # bits of the low half of a difference, so that sums of up to 1024 products of halves fit int32


def rounded(vectors: Float[np.ndarray, "*dims C"]) -> Float[np.ndarray, "*dims C"]:
    """Vectors in units of 2^-22: whole numbers, as float32, of numbers between -2 and 2."""
    return np.rint(np.asarray(vectors, np.float32) * np.float32(2.0**BITS))


def host_distances(query: Float[np.ndarray, "n E"], key: Float[np.ndarray, "n m E"]) -> Float[np.ndarray, "n m"]:
    """Squared L2 distances of queries and their keys in NumPy, float32; the same bits as ``squared_distances``.

    Args:
      query, key: numbers between -1 and 1; E is at most 1024.
    """
    apart = (rounded(key) - rounded(query)[:, None]).astype(np.float64)  # whole numbers below 2^24
    total = np.einsum("nme,nme->nm", apart, apart).astype(np.int64)  # below 2^53, so exact
    high, low = (total >> 2 * LOW).astype(np.float32), (total & (4**LOW - 1)).astype(np.float32)
    return high * np.float32(2.0 ** (2 * LOW - 2 * BITS)) + low * np.float32(2.0 ** (-2 * BITS))


def squared_distances(query: Float[Array, "... E"], key: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Squared L2 distances in XLA, float32; arguments, which broadcast, and bits as ``host_distances``."""
    units = (jnp.round(x.astype(jnp.float32) * 2.0**BITS).astype(jnp.int32) for x in (query, key))
    apart = next(units) - next(units)
    high = (apart + 2 ** (LOW - 1)) >> LOW
    low = apart - (high << LOW)  # between -2^10 and 2^10
    squares, mixed, rest = (high * high).sum(-1), (high * low).sum(-1), (low * low).sum(-1)
    # the total is squares 2^22 + mixed 2^12 + rest; what of it is 2^22 or more is carried
    rest = rest + ((mixed & 1023) << (LOW + 1))
    total_high = squares + (mixed >> (LOW - 1)) + (rest >> 2 * LOW)
    total_low = rest & (4**LOW - 1)
    scale = 2.0 ** (2 * LOW - 2 * BITS), 2.0 ** (-2 * BITS)
    # products with powers of two are exact, so that it does not matter whether they are fused with the sum
    return total_high.astype(jnp.float32) * scale[0] + total_low.astype(jnp.float32) * scale[1]


def score_error(numbers: int, parts: int) -> float:
    """Most by which 2 parts - 2 q·k, summed in float32 in any order, differs from ``squared_distances``.

    Args:
      numbers: E. Queries and keys are so many parts of unit norm each, as float32 has it.
    """
    unit = 2.0**-24
    summed = 2 * numbers * unit * parts  # the products' absolute values sum to the number of parts at most
    norms = 2 * parts * (numbers / parts + 6) * unit  # of both, whose numbers were divided by a rounded norm
    grid = 4 * parts**0.5 * numbers**0.5 * 2.0**-BITS  # the root of the largest distance is 2 sqrt(parts)
    return summed + norms + grid + 4 * parts * unit
