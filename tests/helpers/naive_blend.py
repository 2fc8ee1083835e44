"""The oracle of FAiD's blending: the window of every neighbour of every cell, convolved twice, as the paper says it.

Source: docs/reference.md "FAiD" and quirks 3, 5, 15. Of ``Blender`` it takes the parameters alone.
"""

import jax
import jax.numpy as jnp

from arrag_jax.nn.faid import Blended, Blender


def windows(hidden, features, hop):
    """[B, T, K, 2h+1, 2h+1, D]: past cells around each cell, zeros for the rest, the feature in the centre.

    Args:
      hidden: [B, H, W, D]; features: [B, T, K, D].
    """
    batch, height, width, dim = hidden.shape
    side, slots = 2 * hop + 1, features.shape[2]
    padded = jnp.pad(hidden, ((0, 0), (hop, hop), (hop, hop), (0, 0)))
    positions = []
    for position in range(height * width):
        row, column = divmod(position, width)
        window = jax.lax.dynamic_slice(padded, (0, row, column, 0), (batch, side, side, dim))  # one program for all
        past = jnp.arange(side * side).reshape(1, side, side, 1) < side * side // 2
        positions.append(jnp.where(past, window, 0.0))
    patches = jnp.broadcast_to(jnp.stack(positions, 1)[:, :, None], (batch, height * width, slots, side, side, dim))
    return patches.at[:, :, :, hop, hop].set(features)


def convolve(patches, conv):
    """VALID convolution (cross-correlation) of [N, s, s, D] with [k, k, D, D]."""
    kernel, bias = conv.kernel[...], conv.bias[...]
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(patches, kernel, (1, 1), "VALID", dimension_numbers=numbers)
    return out + bias[None, None, None]


def normed(blender, features, height, width):
    """Features over their root mean square, times the norm's scale; zeros in cells that lack a context."""
    mean = jnp.square(features.astype(jnp.float32)).mean(-1, keepdims=True)
    features = features * jax.lax.rsqrt(mean + blender.norm.epsilon) * blender.norm_scale[...][None, None, None]
    row, column = jnp.divmod(jnp.arange(height * width), width)
    complete = (row > 0) & (column > 0) & (column < width - 1)  # three cells above, one on the left
    return jnp.where(complete[None, :, None, None], features, 0.0)


def gate(blender, value):
    """[..., D] → [..., 1]: linear, ReLU, linear, sigmoid."""
    dense = lambda x, layer: x @ layer.weight[...].T + layer.bias[...][None, None, None]  # noqa: E731
    enter, leave = blender.gate
    return jax.nn.sigmoid(dense(jax.nn.relu(dense(value, enter)), leave))


def blend_map(blender: Blender, hidden, features) -> Blended:
    """``Blender.blend_map``: every slot's window through both convolutions of every hop, hops mixed, then gated."""
    incoming = normed(blender, features, *hidden.shape[1:3]).astype(hidden.dtype)
    hops, value = blender.config.hops, 0.0
    weights = jnp.ones(1) if blender.conv_weights is None else jax.nn.softmax(blender.conv_weights[...])
    for weight, hop in zip(weights, hops, strict=True):
        patches = windows(hidden, incoming, hop)
        flat = patches.reshape(-1, *patches.shape[3:])
        out = convolve(convolve(flat, getattr(blender, f"conv{hop}")), getattr(blender, f"conv{hop}2"))
        value = value + weight.astype(out.dtype) * out.reshape(features.shape)
    opened = gate(blender, value)
    return Blended((value * opened).mean(-2), value * opened, opened.mean())
