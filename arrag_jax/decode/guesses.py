"""Guesses codes that have not been drawn yet; a guess changes the number of passes, never the picture."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def from_above(
    codes: Int[Array, "B T"], final: Int[Array, " B"], known: Int[Array, " B"], end: Int[Array, " B"], width: int
) -> Int[Array, "B T"]:
    """Returns the codes with the code above as guess of each position from ``known`` to ``end``.

    The last known row repeats as often as it must. A guess before ``known`` is the draw of the last pass.

    Args:
      codes, final, known, end: as in ``interfaces.StoredImages.guesses``.
      width: number of columns of the grid.
    """
    cells = jnp.arange(codes.shape[1])[None]
    beyond = cells - known[:, None]
    above = jnp.maximum(known[:, None] - width + beyond % width, 0)
    guess = jnp.maximum(jnp.take_along_axis(codes, above, 1), 0)
    return jnp.where((beyond >= 0) & (cells < end[:, None]), guess, codes)
