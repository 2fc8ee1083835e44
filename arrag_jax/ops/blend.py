"""FAiD's multi-scale convolutions as one affine map: what the cells around give, plus what the centre gives.

A hop h looks at the (2h+1) x (2h+1) window of hidden states around a cell, future cells left out, a retrieved
feature in the centre, through two stacked VALID convolutions of kernel h+1 with nothing between them. So a hop is
affine in its window, and K features a cell differ in the centre alone: the window is worked off once for all K,
and the centre is one D x D matrix. Source: docs/reference.md "FAiD" and quirks 5, 15, 26.

The cells' part has two forms of the same value. In *stages*, each tap of the first kernel is multiplied once over
the map, its products are shifted and summed, and the second kernel is multiplied: 2(k² − 1) matrices a cell and
hop. *Composed*, the two kernels are multiplied with each other first: one matrix a live tap (4 for hop 1, 12 for
hop 2, 24 for hop 3, shared by the hops), paid for with D rows for every pair of kernel taps. ``cheaper_composed``
says which costs less; decoding, which uses the same kernels for every cell, always composes.

Kernels and what they are composed to are [in, out]. Products are summed in float32 whatever the inputs are. So are
the gradients of a number that several products take: it is widened first, and rounded back for each of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrag_jax.ops import products

Offset = tuple[int, int]  # (row, column) from the cell


class HopKernels(NamedTuple):
    """The two convolutions of one hop, k = hop + 1."""

    first: Float[Array, "k k D D"]
    first_bias: Float[Array, " D"]
    second: Float[Array, "k k D D"]
    second_bias: Float[Array, " D"]

    @property
    def hop(self) -> int:
        """h of the (2h+1) x (2h+1) window."""
        return self.first.shape[0] - 1


class Centre(NamedTuple):
    """What a feature r in the centre gives: matrix r + bias, all hops together."""

    matrix: Float[Array, "D D"]  # [out, in], as ``ops.products.linear`` takes it
    bias: Float[Array, " D"]


def live_offsets(hop: int) -> list[Offset]:
    """Offsets of the cells in a hop's window that are drawn before the centre, in raster order."""
    rows = [(row, column) for row in range(-hop, 0) for column in range(-hop, hop + 1)]
    return rows + [(0, column) for column in range(-hop, 0)]


def live_pairs(hop: int) -> list[tuple[Offset, Offset, Offset]]:
    """(tap of the first kernel, tap of the second, offset that they reach together), live offsets alone."""
    taps = [(row, column) for row in range(hop + 1) for column in range(hop + 1)]
    reach = [(a, u, (a[0] + u[0] - hop, a[1] + u[1] - hop)) for u in taps for a in taps]
    return [(a, u, offset) for a, u, offset in reach if offset < (0, 0)]


def cheaper_composed(hops: Sequence[int], positions: int, width: int) -> bool:
    """Do composed kernels cost fewer multiply-adds than stages, for so many cells (a device's, B·T) of this width?

    In units of width²: a live pair of taps costs ``width`` to compose, and each form its matrices a cell.
    """
    pairs = sum(len(live_pairs(hop)) for hop in hops)
    staged = sum(2 * ((hop + 1) ** 2 - 1) for hop in hops)
    return pairs * width + len(live_offsets(max(hops))) * positions < staged * positions


def centre(kernels: Sequence[HopKernels], weights: Float[Array, " hops"]) -> Centre:
    """The centre's matrix and the bias of all hops, each weighted.

    Args:
      kernels: one a hop.
      weights: of the hops; they sum to 1.
    """
    matrix: Any = 0.0
    bias: Any = 0.0
    for weight, (first, first_bias, second, second_bias) in zip(weights, kernels, strict=True):
        # The pairs that reach the centre are a tap and its mirror image. The first bias, which every tap of the second
        # kernel meets, goes along as one more row.
        row = jnp.broadcast_to(first_bias.astype(jnp.float32), (*first.shape[:2], 1, len(first_bias)))
        rows = jnp.concatenate([first[::-1, ::-1], row.astype(first.dtype)], axis=2)
        product = products.einsum("uvio,uvop->pi", rows, second)
        matrix += weight * product[:, :-1]
        bias += weight * (product[:, -1] + second_bias)
    return Centre(matrix.astype(first.dtype), bias)


def around_staged(
    kernels: Sequence[HopKernels], weights: Float[Array, " hops"], hidden: Float[Array, "B H W D"]
) -> Float[Array, "B H W D"]:
    """What the cells drawn before each cell give it, in stages; float32, without bias.

    Args:
      hidden: of the cells themselves; cells outside the map count as zeros.
    """
    _, height, width, _ = hidden.shape
    wide = hidden.astype(jnp.float32)
    total: Any = 0.0
    for weight, kernel in zip(weights, kernels, strict=True):
        hop, pairs = kernel.hop, live_pairs(kernel.hop)
        first, second = _taps(kernel.first), _taps(kernel.second)
        taps = sorted({a for a, _, _ in pairs})
        stacked = jnp.concatenate([first[a].astype(hidden.dtype) for a in taps], axis=1)
        of_positions = products.einsum("bhwi,io->bhwo", wide.astype(hidden.dtype), stacked)
        # Padded tap by tap: the gradient of a slice is as large as what it was cut from.
        around = ((0, 0), (hop, 0), (hop, hop), (0, 0))
        of_tap = {a: jnp.pad(x, around) for a, x in zip(taps, jnp.split(of_positions, len(taps), axis=-1), strict=True)}
        summed: dict[Offset, Any] = {}
        for a, u, (row, column) in pairs:
            rows, columns = slice(hop + row, hop + row + height), slice(hop + column, hop + column + width)
            summed[u] = summed.get(u, 0.0) + of_tap[a][:, rows, columns]
        stacked = jnp.concatenate([second[u].astype(hidden.dtype) for u in summed])
        sums = jnp.concatenate(list(summed.values()), axis=-1).astype(hidden.dtype)
        total += weight * products.einsum("bhwi,io->bhwo", sums, stacked)
    return total


def compose(kernels: Sequence[HopKernels], weights: Float[Array, " hops"]) -> Float[Array, "n D D"]:
    """One matrix a live offset of the largest hop, in the order of ``live_offsets``."""
    matrices: dict[Offset, Any] = {}
    dtype = kernels[0].first.dtype
    for weight, kernel in zip(weights, kernels, strict=True):
        pairs = live_pairs(kernel.hop)
        of_first, of_second = _taps(kernel.first), _taps(kernel.second)
        for offset in live_offsets(kernel.hop):
            first = jnp.stack([of_first[a].astype(dtype) for a, _, reached in pairs if reached == offset])
            second = jnp.stack([of_second[u].astype(dtype) for _, u, reached in pairs if reached == offset])
            matrices[offset] = matrices.get(offset, 0.0) + weight * products.einsum("nio,nop->ip", first, second)
    largest = max(kernel.hop for kernel in kernels)
    return jnp.stack([matrices[offset] for offset in live_offsets(largest)]).astype(dtype)


def around_composed(
    matrices: Float[Array, "n D D"], offsets: Sequence[Offset], hidden: Float[Array, "B H W D"]
) -> Float[Array, "B H W D"]:
    """``around_staged`` from the matrices of ``compose`` and their offsets."""
    _, height, width, _ = hidden.shape
    hop = -min(row for row, _ in offsets)
    padded = jnp.pad(hidden.astype(jnp.float32), ((0, 0), (hop, 0), (hop, hop), (0, 0)))
    positions = [padded[:, hop + r : hop + r + height, hop + c : hop + c + width] for r, c in offsets]
    windows = jnp.concatenate([x.astype(hidden.dtype) for x in positions], axis=-1)
    return products.einsum("bhwi,io->bhwo", windows, matrices.reshape(-1, matrices.shape[-1]))


def _taps(kernel: Float[Array, "k k D D"]) -> dict[Offset, Float[Array, "D D"]]:
    """By row and column, in raster order, widened."""
    side, _, width, _ = kernel.shape
    taps = jnp.split(kernel.astype(jnp.float32).reshape(-1, width), side * side)
    return dict(zip(np.ndindex(side, side), taps, strict=True))
