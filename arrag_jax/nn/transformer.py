"""Defines a Llama decoder (RMSNorm, rotary positions, SwiGLU, grouped-query attention) with a KV cache.

With a ``FaidConfig`` some layers have a blender (``nn.faid``), which adds retrieved features to the hidden state
between attention and MLP. Complete sequences run through a scan over the layers (``nn.depth``). Decoding and its
prefill unroll them, because a scan copies its slice of the stacked weights and of the cache at every step.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.mesh import split_rows
from arrag_jax.nn import depth
from arrag_jax.nn.attention import attend, attend_causally
from arrag_jax.nn.cache import Cache, written
from arrag_jax.nn.faid import Blender, FaidConfig
from arrag_jax.nn.layer import Layer, LlamaConfig
from arrag_jax.nn.linear import embedding
from arrag_jax.nn.rotary import Turn, turn_by_grid, turn_by_tokens


class Llama(nnx.Module):
    """The decoder: embedding, layers and final norm. It has no text head, because no text is generated."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, faid: FaidConfig | None = None):
        self.config = config
        self.remat = "none"  # ``TrainConfig.remat``
        init = nnx.initializers.normal(config.width**-0.5)
        self.embed_tokens = embedding(config.vocab_size, config.width, rngs, init)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        if faid is not None:
            self.add_blenders(faid, rngs)

    def add_blenders(self, faid: FaidConfig, rngs: nnx.Rngs, start_silent: bool = False) -> None:
        """Adds a fresh blender to every layer whose number is a multiple of ``faid.stride``, in place."""
        for layer in self.layers[:: faid.stride]:
            layer.blender = nnx.data(Blender(faid, self.config.width, self.config.norm_eps, rngs, start_silent))

    def hold_in_int8(self) -> None:
        """Holds the linear layers of all layers in int8 (``nn.linear.Int8Linear``), in place, for decoding alone.

        Embedding, norms, LoRA and blenders stay as they are.
        """
        for layer in self.layers:
            layer.hold_in_int8()

    def fused(self) -> "Llama":
        """Returns a copy for decoding whose blenders are fused; all other arrays are shared."""
        copy = nnx.merge(*nnx.split(self))
        for layer, mine in zip(copy.layers, self.layers, strict=True):
            if mine.blender is not None:
                layer.blender = nnx.data(mine.blender.fuse())
        return copy

    def _turn(self, positions: Int[Array, "R S"], width: int) -> Turn:
        """Returns the rotation of tokens at these rotary positions; ``width`` is the number of grid columns."""
        config = self.config
        if config.rotary == "tokens":
            return turn_by_tokens(positions, config.head_width, config.rope_theta)
        return turn_by_grid(positions, width, config.head_width, config.rope_theta)

    def forward(
        self,
        x: Float[Array, "R S D"],
        positions: Int[Array, "R S"],
        filled: Bool[Array, "R S"],
        grid: tuple[int, int],
        features: Float[Array, "R T K D"] | None = None,
        conditional: Bool[Array, " R"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "R S D"], Float[Array, " blenders"]]:
        """Runs complete sequences; a token attends to itself and to the filled tokens before it.

        Args:
          positions: rotary positions, of the kind that the config names.
          grid: H and W; the last T tokens predict the T positions of the grid, in order.
          features: retrieved features of every position; None = blenders are skipped.
          conditional: rows that have a caption, the only rows in which blenders add features; None = all rows.
          rngs: random streams for dropout; None = no dropout.

        Returns:
          The normed hidden states, and the mean gate of each blender.
        """
        height, width = grid
        turn = self._turn(positions, width)
        attend = functools.partial(attend_causally, filled=filled)

        def plain(layer: Layer, x: Array, rngs: nnx.Rngs | None) -> Array:
            return split_rows(layer.feed_forward(layer.attend(x, turn, attend, rngs=rngs)[1]))

        def blending(layer: Layer, x: Array, features: Array, rngs: nnx.Rngs | None) -> tuple[Array, Array, Array]:
            normed, x, _ = layer.attend(x, turn, attend, rngs=rngs)
            # A position's own token follows the token that predicts it; the last position's is not in the input.
            hidden = jnp.pad(normed[:, x.shape[1] - height * width + 1 :], ((0, 0), (0, 1), (0, 0)))
            blended = layer.blender.blend_map(hidden.reshape(-1, height, width, hidden.shape[-1]), features)
            added = blended.added
            if conditional is not None:
                added = jnp.where(conditional[:, None, None], added, 0)
            x = x.at[:, -height * width :].add(added)
            return split_rows(layer.feed_forward(x)), split_rows(blended.features), blended.gate

        gates, done, x = [], 0, split_rows(x)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), len(self.layers))
        for first, others in self._runs(features is not None):
            if first is not None and features is not None:
                key = None if keys is None else keys[done]
                x, features, gate = depth.single(first, blending, (x, features), key, self.remat)
                gates.append(gate)
                done += 1
            own = None if keys is None else keys[done : done + len(others)]
            x = depth.scanned(others, plain, x, own, self.remat)
            done += len(others)
        return self.norm(x), jnp.stack(gates) if gates else jnp.zeros(0)

    def _runs(self, blends: bool) -> Iterator[tuple[Layer | None, list[Layer]]]:
        """Yields the layers in order: a layer that blends (None at the start), and the equal layers after it."""
        run: list[Layer] = []
        first = None
        for layer in self.layers:
            if blends and layer.blender is not None:
                yield first, run
                first, run = layer, []
            else:
                run.append(_without_blender(layer))
        yield first, run

    def prefill(self, x: Float[Array, "R S D"], filled: Bool[Array, "R S"], cells: int, blended_rows: int) -> Cache:
        """Returns the cache of a left-padded prompt without its last token, with free slots for ``cells`` positions.

        Args:
          blended_rows: number of leading rows for which ``step`` receives features; 0 if it receives none.
        """
        first = filled.sum(axis=1, dtype=jnp.int32)
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        if self.config.rotary == "positions":  # the prompt has no places in the grid
            first, positions = jnp.full_like(first, -1), jnp.full_like(positions, -1)
        turn, attend = self._turn(positions, 1), functools.partial(attend_causally, filled=filled)
        room = ((0, 0), (0, 0), (0, cells), (0, 0))
        keys, values, looked_at = [], [], []
        for layer in self.layers:
            if x.shape[1]:
                _, x, (k, v) = layer.attend(x, turn, attend)
                x = layer.feed_forward(x)
            else:  # the prompt is a single token, which ``step`` takes
                k = v = jnp.zeros((len(x), self.config.kv_heads, 0, self.config.head_width), x.dtype)
            keys.append(jnp.pad(k, room))
            values.append(jnp.pad(v, room))
            if blended_rows and layer.blender is not None:
                looked_at.append(jnp.zeros((blended_rows, cells + 1, x.shape[-1]), x.dtype))
        filled = jnp.pad(filled, ((0, 0), (0, cells)), constant_values=True)
        return Cache(tuple(keys), tuple(values), filled, first, tuple(looked_at))

    def step(
        self,
        x: Float[Array, "R D"],
        cache: Cache,
        position: Int[Array, ""],
        grid: tuple[int, int],
        features: Float[Array, "B K D"] | None = None,
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Runs one token per row, in the slot of ``position``; returns the normed hidden state and the new cache.

        Args:
          features: retrieved features of the first B rows, where B is ``blended_rows`` of ``prefill``. The blenders
            must be fused.
        """
        states, cache = self.window(x[:, None], cache, position, grid, None if features is None else features[:, None])
        return states[:, 0], cache

    def window(
        self,
        x: Float[Array, "R S D"],
        cache: Cache,
        first: Int[Array, "*R"],
        grid: tuple[int, int],
        features: Float[Array, "B S K D"] | None = None,
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Runs S tokens per row, in the slots from ``first`` on; returns their normed hidden states and the new cache.

        Later slots may hold anything: a token attends to the slots before its own.

        Args:
          first: number of the first position: one for all rows, or one per row.
          features: as in ``step``.
        """
        slots, steps = jnp.arange(cache.filled.shape[1])[None, None], jnp.arange(x.shape[1])
        slot = slots.shape[2] - grid[0] * grid[1] + first
        places = jnp.reshape(first, (-1, 1)) + steps[None]
        at = (jnp.reshape(slot, (-1, 1)) + steps[None])[:, :, None]
        mask = (cache.filled[:, None] & (slots < at)) | (slots == at)
        turn = self._turn(cache.first[:, None] + places, grid[1])
        over_cache = functools.partial(attend, mask=mask)
        looked_at: list[Array] = []
        keys, values = [], []
        for layer, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            normed, x, (k, v) = layer.attend(x, turn, over_cache, (k, v), slot)
            keys.append(k)
            values.append(v)
            if features is not None and layer.blender is not None:
                rows = len(features)
                past = written(cache.looked_at[len(looked_at)], normed[:rows], first[:rows] if first.ndim else first, 1)
                looked_at.append(past)
                blended = layer.blender.blend_window(past, places[:rows], grid, features)
                x, features = x.at[:rows].add(blended.added), blended.features
            x = layer.feed_forward(x)
        cache = cache._replace(keys=tuple(keys), values=tuple(values), looked_at=tuple(looked_at))
        return self.norm(x), cache


def _without_blender(layer: Layer) -> Layer:
    """Returns a layer that shares all arrays and does not blend."""
    if layer.blender is None:
        return layer
    bare = nnx.merge(*nnx.split(layer))
    bare.blender = nnx.data(None)
    return bare
