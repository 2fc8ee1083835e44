"""Computes rotary position embeddings, which rotate the queries and keys of each token.

There are two kinds. Llama counts the tokens of a sequence. Each pair of channels has one angle, and the channels of a
pair are half a head apart. LlamaGen uses the place of a code in the grid. The first half of the pairs rotates with the
row, the second half with the column, and the channels of a pair are adjacent. LlamaGen's condition tokens have no place
in the grid. Their cosine and sine are both 0, which is not the rotation by the angle 0: their queries and keys become
zero vectors, and only their values have an effect.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KINDS = ("tokens", "positions")  # token counts of the sequence | raster indices of the grid, -1 outside it


class Turn(NamedTuple):
    """The rotation of every token: cosine and sine of its angles, float32."""

    cos: Float[Array, "R S half"]
    sin: Float[Array, "R S half"]


def turn_by_tokens(tokens: Int[Array, "R S"], head_dim: int, theta: float) -> Turn:
    """Returns the rotation of tokens, given by their places in the sequence."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = tokens[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    return Turn(jnp.cos(angle), jnp.sin(angle))


def turn_by_grid(position: Int[Array, "R S"], width: int, head_dim: int, theta: float) -> Turn:
    """Returns the rotation of raster indices in a grid with ``width`` columns; zeros where an index is -1."""
    quarter = head_dim // 4
    frequency = theta ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    both = jnp.stack([position // width, position % width], axis=-1).astype(jnp.float32)
    angle = (both[..., None] * frequency[None, None, None, :]).reshape(*position.shape, 2 * quarter)
    inside = (position >= 0)[..., None]
    return Turn(jnp.where(inside, jnp.cos(angle), 0), jnp.where(inside, jnp.sin(angle), 0))


def turn_halves(x: Float[Array, "R S heads hd"], turn: Turn) -> Float[Array, "R S heads hd"]:
    """Returns x rotated in pairs of channels that are half a head apart (Llama), computed in the dtype of x."""
    half = x.shape[-1] // 2
    cos, sin = (numbers[:, :, None].astype(x.dtype) for numbers in turn)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def turn_neighbors(x: Float[Array, "R S heads hd"], turn: Turn) -> Float[Array, "R S heads hd"]:
    """Returns x rotated in pairs of adjacent channels (LlamaGen), computed in float32."""
    cos, sin = (numbers[:, :, None] for numbers in turn)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)
