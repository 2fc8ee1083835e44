"""Rotary positions: how far each token's queries and keys turn.

Two kinds. A Llama counts a sequence's tokens: one angle per pair of channels, which lie half a head apart. LlamaGen
places a code in the grid: the first half of the pairs turns with the row, the second with the column, and the
channels of a pair are neighbours. Its condition tokens have no position there, and cosine and sine of theirs are both
0, not those of the angle 0: their queries and keys become zero vectors, and only their values are read.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KINDS = ("tokens", "positions")  # positions count a sequence's tokens | are raster indices of the grid, -1 outside it


class Turn(NamedTuple):
    """Cosine and sine of every token's angles, float32."""

    cos: Float[Array, "R S half"]
    sin: Float[Array, "R S half"]


def turn_by_tokens(tokens: Int[Array, "R S"], head_dim: int, theta: float) -> Turn:
    """Returns the turn of the n-th tokens of a sequence."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = tokens[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    return Turn(jnp.cos(angle), jnp.sin(angle))


def turn_by_grid(position: Int[Array, "R S"], width: int, head_dim: int, theta: float) -> Turn:
    """Returns the turn of raster indices of a grid with ``width`` columns; zeros where an index is -1."""
    quarter = head_dim // 4
    frequency = theta ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    both = jnp.stack([position // width, position % width], axis=-1).astype(jnp.float32)
    angle = (both[..., None] * frequency[None, None, None, :]).reshape(*position.shape, 2 * quarter)
    inside = (position >= 0)[..., None]
    return Turn(jnp.where(inside, jnp.cos(angle), 0), jnp.where(inside, jnp.sin(angle), 0))


def turn_halves(x: Float[Array, "R S heads hd"], turn: Turn) -> Float[Array, "R S heads hd"]:
    """Returns x turned in the half-split form of Llama, computed in the type of x."""
    half = x.shape[-1] // 2
    cos, sin = (numbers[:, :, None].astype(x.dtype) for numbers in turn)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def turn_neighbors(x: Float[Array, "R S heads hd"], turn: Turn) -> Float[Array, "R S heads hd"]:
    """Returns x turned in pairs of neighbouring channels, computed in float32."""
    cos, sin = (numbers[:, :, None] for numbers in turn)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)
