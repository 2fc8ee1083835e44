"""The oracle of FAiD's blending: the window of every neighbour of every cell, convolved twice, as the paper says it.

Source: reference README "FAiD" and quirks 3, 5, 15.
"""

import jax
import jax.numpy as jnp


def windows(hidden, features, hop):
    """[B, T, K, 2h+1, 2h+1, D]: past cells around each cell, zeros for the rest, the feature in the centre.

    Args:
      hidden: [B, H, W, D]; features: [B, T, K, D].
    """
    batch, height, width, dim = hidden.shape
    side, slots = 2 * hop + 1, features.shape[2]
    padded = jnp.pad(hidden, ((0, 0), (hop, hop), (hop, hop), (0, 0)))
    cells = []
    for cell in range(height * width):
        row, column = divmod(cell, width)
        window = padded[:, row : row + side, column : column + side]
        past = jnp.arange(side * side).reshape(1, side, side, 1) < side * side // 2
        cells.append(jnp.where(past, window, 0.0))
    patches = jnp.broadcast_to(jnp.stack(cells, 1)[:, :, None], (batch, height * width, slots, side, side, dim))
    return patches.at[:, :, :, hop, hop].set(features)


def convolve(patches, kernel, bias):
    """VALID convolution (cross-correlation) of [N, s, s, D] with [k, k, D, D]."""
    return (
        jax.lax.conv_general_dilated(patches, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + bias[None, None, None]
    )


def blend(kernels, weights, gate, hidden, features):
    """[B, T, K, D]: every slot's window through both convolutions of every hop, hops mixed, then gated.

    Args:
      kernels: one (first, first_bias, second, second_bias) a hop.
      weights: of the hops, summing to 1.
      gate: [..., D] → [..., 1], or None for the value before the gate.
    """
    total = 0.0
    for weight, (first, first_bias, second, second_bias) in zip(weights, kernels, strict=True):
        patches = windows(hidden, features, first.shape[0] - 1)
        flat = patches.reshape(-1, *patches.shape[3:])
        out = convolve(convolve(flat, first, first_bias), second, second_bias)
        total = total + weight * out.reshape(features.shape)
    return total if gate is None else total * gate(total)
