"""Computes FAiD's multi-scale convolutions as one affine map: a term of the surrounding positions plus a centre term.

For a hop h, FAiD takes the (2h+1) x (2h+1) window of hidden states around a position. Future positions are left out,
and a retrieved feature is put in the centre. Two VALID convolutions with kernel size k = h+1 follow, with no
nonlinearity between them. So the result is affine in the window. The K features of a position differ only in the
centre. The window's term is therefore computed once for all K features, and the centre's term needs one D x D matrix.
Source: docs/reference.md "FAiD" and quirks 5, 15, 26.

The window's term can be computed in two ways, which give the same value:

  Staged: every tap of the first kernel is multiplied with the whole map, the products are shifted and summed, and the
  second kernel is applied. This takes 2(k² − 1) matrix products per position and hop.

  Composed: the two kernels are first multiplied with each other. This gives one matrix per live offset, that is, per
  offset drawn before the centre: 4 for hop 1, 12 for hop 2, 24 for hop 3, shared by all hops. The composition itself
  costs D rows per pair of kernel taps.

``cheaper_composed`` decides which way costs less. Decoding always composes, because it uses the same kernels for every
position. Devices that split the kernels along the inputs of the first ones each compose their share of the matrices.

Kernels and composed matrices are [in, out]. Products are summed in float32 for every input type. If several products
use one value, the value is first converted to float32 and rounded for each product, so its gradients are summed in
float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrag_jax.ops import products

Offset = tuple[int, int]  # (row, column) relative to the centre position


class HopKernels(NamedTuple):
    """The two convolutions of one hop; the kernel size is k = hop + 1."""

    first: Float[Array, "k k D D"]
    first_bias: Float[Array, " D"]
    second: Float[Array, "k k D D"]
    second_bias: Float[Array, " D"]

    @property
    def hop(self) -> int:
        """The hop h, whose window is (2h+1) x (2h+1)."""
        return self.first.shape[0] - 1


class Centre(NamedTuple):
    """The centre's term, summed over all hops: matrix · r + bias for a retrieved feature r."""

    matrix: Float[Array, "D D"]  # [out, in], as ``ops.products.linear`` takes it
    bias: Float[Array, " D"]


def live_offsets(hop: int) -> list[Offset]:
    """Returns the offsets in a hop's window that are drawn before the centre, in raster order."""
    rows = [(row, column) for row in range(-hop, 0) for column in range(-hop, hop + 1)]
    return rows + [(0, column) for column in range(-hop, 0)]


def live_pairs(hop: int) -> list[tuple[Offset, Offset, Offset]]:
    """Returns the tap pairs that reach a live offset: (tap of the first kernel, tap of the second, offset)."""
    taps = [(row, column) for row in range(hop + 1) for column in range(hop + 1)]
    reach = [(a, u, (a[0] + u[0] - hop, a[1] + u[1] - hop)) for u in taps for a in taps]
    return [(a, u, offset) for a, u, offset in reach if offset < (0, 0)]


def cheaper_composed(hops: Sequence[int], positions: int, width: int, shares: int = 1) -> bool:
    """Returns whether the composed form needs fewer multiply-adds than the staged form.

    Costs are counted in units of width²: composing one live pair of taps costs ``width``, and each matrix costs one per
    position.

    Args:
      positions: B·T, the number of positions on one device.
      width: D.
      shares: number of devices that compose together.
    """
    pairs = sum(len(live_pairs(hop)) for hop in hops)
    staged = sum(2 * ((hop + 1) ** 2 - 1) for hop in hops)
    return pairs * width / shares + len(live_offsets(max(hops))) * positions < staged * positions


def centre(kernels: Sequence[HopKernels], weights: Float[Array, " hops"], split: bool = False) -> Centre:
    """Returns the centre's matrix and the bias, each a weighted sum over hops.

    Args:
      kernels: one per hop.
      weights: weights of the hops; they sum to 1.
      split: the first kernels are split over devices along their inputs, to which no row can then be appended.
    """
    matrix: Any = 0.0
    bias: Any = 0.0
    for weight, (first, first_bias, second, second_bias) in zip(weights, kernels, strict=True):
        # A tap and its mirror image reach the centre together. Every tap of the second kernel multiplies the first
        # bias: appended as one more row, it costs a CPU less than a product of its own.
        row = jnp.broadcast_to(first_bias.astype(jnp.float32), (*first.shape[:2], 1, len(first_bias)))
        rows, row = first[::-1, ::-1], row.astype(first.dtype)
        if split:
            product, of_bias = (products.einsum("uvio,uvop->pi", x, second) for x in (rows, row))
        else:
            both = products.einsum("uvio,uvop->pi", jnp.concatenate([rows, row], axis=2), second)
            product, of_bias = both[:, :-1], both[:, -1:]
        matrix += weight * product
        bias += weight * (of_bias[:, 0] + second_bias)
    return Centre(matrix.astype(first.dtype), bias)


def around_staged(
    kernels: Sequence[HopKernels], weights: Float[Array, " hops"], hidden: Float[Array, "B H W D"]
) -> Float[Array, "B H W D"]:
    """Returns the window's term of every position, computed in the staged form; float32, without bias.

    Args:
      kernels: one per hop.
      weights: weights of the hops; they sum to 1.
      hidden: hidden states of the positions; positions outside the map count as zeros.
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
        # Each tap is padded on its own, because the gradient of a slice is as large as the array it is cut from.
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
    """Returns one matrix per live offset of the largest hop, in the order of ``live_offsets``."""
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
    """Returns the same as ``around_staged``, computed from the matrices of ``compose`` and their offsets."""
    _, height, width, _ = hidden.shape
    hop = -min(row for row, _ in offsets)
    padded = jnp.pad(hidden.astype(jnp.float32), ((0, 0), (hop, 0), (hop, hop), (0, 0)))
    positions = [padded[:, hop + r : hop + r + height, hop + c : hop + c + width] for r, c in offsets]
    windows = jnp.concatenate([x.astype(hidden.dtype) for x in positions], axis=-1)
    return products.einsum("bhwi,io->bhwo", windows, matrices.reshape(-1, matrices.shape[-1]))


def _taps(kernel: Float[Array, "k k D D"]) -> dict[Offset, Float[Array, "D D"]]:
    """Returns the taps of a kernel by (row, column), in raster order, as float32."""
    side, _, width, _ = kernel.shape
    # The axes that devices may split stay as they are.
    taps = jnp.split(kernel.astype(jnp.float32).reshape(side * side, width, width), side * side)
    return {place: tap[0] for place, tap in zip(np.ndindex(side, side), taps, strict=True)}
