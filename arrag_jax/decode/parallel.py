"""Draws several positions in one pass of the model, and gets the same pictures, code for code.

A pass runs the backbone over a window of positions whose codes are guesses, and draws every one of them with *its own*
noise, given the guesses before it. The first draw is right, because all codes before it are final. Each further draw is
right as long as the guesses before it equal their draws. The draws beyond the first wrong guess become the next
guesses. No draw is rejected at random: the only fixed point is the picture that one position per pass gives.

This is Jacobi decoding with a coupling of draft and draw by their Gumbel noise (arXiv 2510.24211). There the noise
follows the sequence of draws; here it belongs to the position, so the seed's picture does not change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arrag_jax.decode.passes import Passes, Run, SampleOutput
from arrag_jax.interfaces import Cache, WindowBackbone


class Ahead(NamedTuple):
    """What is known beyond the drawn positions.

    Attributes:
      codes: final codes, then guesses; -1 beyond these.
      known: number of final codes and guesses of each row.
      passes: number of passes so far.
    """

    codes: Int[Array, "B T"]
    known: Int[Array, " B"]
    passes: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Passes over a window per row, of ``sampling.window`` positions; rows stand at different positions.

    Attributes:
      hidden: input of position 0, from ``Backbone.prefill``.
      keys: one random key per image.
      guess: as ``interfaces.StoredImages.guesses``.
    """

    passes: Passes
    hidden: Float[Array, "R D"]
    keys: Key[Array, " B"]
    guess: Callable[..., Int[Array, "B T"]]

    def one_pass(
        self, final: Int[Array, " B"], hidden: Float[Array, "R D"], cache: Cache, out: SampleOutput, ahead: Ahead
    ) -> tuple[Any, ...]:
        """Returns the fields of the ``loop.Drawing`` after one more pass; takes those of the one before it."""
        width, total = self.passes.sampling.window, out.codes.shape[1]
        first = jnp.minimum(final, total - width)  # the window ends at the grid's end at the latest
        places, cells = first[:, None] + jnp.arange(width)[None], jnp.arange(total)[None]
        codes = self.guess(ahead.codes, final, ahead.known, first + width)
        if (known := self.passes.known) is not None:  # they are right, whatever was guessed
            codes = jnp.where((known >= 0) & (cells < (first + width)[:, None]), known, codes)
        window, cache = self._drawn(codes, places, final, cache)
        right = jnp.cumprod(window.codes == jnp.take_along_axis(codes, places, 1), axis=1).sum(1)
        end = jnp.minimum(first + right + 1, first + width)
        fresh = (places >= final[:, None]) & (places < end[:, None])
        window = window._replace(drawn_in=jnp.broadcast_to(ahead.passes, places.shape))

        def put(whole: Array, new: Array) -> Array:
            shape = (*fresh.shape, *(1,) * (new.ndim - 2))
            old = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width))(whole, first)
            new = jnp.where(fresh.reshape(shape), new, old)
            return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(
                whole, new, first
            )

        drawn = jnp.clip(cells - first[:, None], 0, width - 1)
        inside = (cells >= first[:, None]) & (cells < first[:, None] + width)
        codes = jnp.where(inside, jnp.take_along_axis(window.codes, drawn, 1), codes)
        return end, hidden, cache, jax.tree.map(put, out, window), Ahead(codes, first + width, ahead.passes + 1)

    def _drawn(
        self, codes: Int[Array, "B T"], places: Int[Array, "B w"], final: Int[Array, " B"], cache: Cache
    ) -> tuple[SampleOutput, Cache]:
        """Returns the records of the windows' positions, with fields [B, w], and the cache; final codes stay."""
        (batch, width), model = places.shape, cast(WindowBackbone, self.passes.model)
        times = len(self.hidden) // batch  # 2 with guidance
        before = jnp.take_along_axis(codes, jnp.maximum(places - 1, 0), 1)
        inputs = jnp.where(
            jnp.tile(places == 0, (times, 1))[..., None],
            self.hidden[:, None],
            model.embed_codes(jnp.tile(before, (times, 1))),
        )
        # One image needs one position for all rows, which is cheaper than one per row.
        first = places[0, 0] if batch == 1 else jnp.tile(places[:, 0], times)

        def look() -> tuple[Array, Cache]:
            return model.step_states(inputs, cache, first)

        def step(features: Any, looked: tuple[Array, Cache] | None) -> tuple[Array, Cache]:
            if looked is None or features is not None:
                features = None if features is None else features.reshape(batch, width, *features.shape[1:])
                looked = model.step_states(inputs, cache if looked is None else looked[1], first, features)
            logits = model.logits(looked[0])
            return logits.reshape(-1, logits.shape[-1]), looked[1]

        run = Run(look, lambda states: states[:batch].reshape(batch * width, -1), step)
        given = jnp.where(places < final[:, None], jnp.take_along_axis(codes, places, 1), -1)
        record, cache = self.passes.draw(
            jnp.repeat(codes, width, axis=0), places.reshape(-1), jnp.repeat(self.keys, width), run, given.reshape(-1)
        )
        return jax.tree.map(lambda x: x.reshape(batch, width, *x.shape[1:]), record), cache
