"""Defines the KV cache of the decoder, and how new slots are written into it."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
    """The KV cache: keys and values of all layers.

    There are P = L - 1 + T slots: the prompt without its last token, then one slot per position of the grid.

    Attributes:
      keys, values: one array per layer.
      filled: slots that later slots can attend to; those of the grid are marked from the start.
      first: rotary position of slot L - 1, which ``step`` fills at position 0; it is t more for slot L - 1 + t.
      looked_at: one array per blender, the normed hidden states that it uses. Slot 0 belongs to the last token of the
        prompt, slot t + 1 to position t. Empty if no features are given.
    """

    keys: tuple[Float[Array, "R KH P hd"], ...]
    values: tuple[Float[Array, "R KH P hd"], ...]
    filled: Bool[Array, "R P"]
    first: Int[Array, " R"]
    looked_at: tuple[Float[Array, "B slots D"], ...] = ()


def written(held: Array, new: Array, slot: Int[Array, "*R"], axis: int) -> Array:
    """Returns ``held`` [R, ...] with ``new`` from ``slot`` on along an axis: one slot for all rows, or one per row."""
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(held, new, slot, axis)
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.vmap(lambda held, new, slot: put(held, new, slot, axis - 1))(held, new, slot)
