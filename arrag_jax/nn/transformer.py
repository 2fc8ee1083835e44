"""Defines a Llama decoder (RMSNorm, rotary positions, SwiGLU, grouped-query attention) with a KV cache.

With a ``FaidConfig`` some layers have a blender (``nn.faid``), which adds retrieved features to the hidden state
between attention and MLP. The layers are unrolled and not scanned, because on a CPU a scan copies its slice of the
stacked weights at every step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.nn.cache import Cache, written
from arrag_jax.nn.faid import Blender, FaidConfig
from arrag_jax.nn.linear import Linear, embedding
from arrag_jax.nn.lora import Lora, LoraConfig
from arrag_jax.nn.rotary import KINDS, Turn, turn_by_grid, turn_by_tokens, turn_halves, turn_neighbors
from arrag_jax.ops import products


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder; the defaults are those of the preset janus-pro-1b."""

    vocab_size: int = 102400
    width: int = 2048
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    mlp: int = 5632
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    head_dim: int | None = None  # None = width / heads
    rotary: str = "tokens"  # kind of rotary positions, one of ``nn.rotary.KINDS``
    joined: bool = False  # queries, keys and values come from one matrix, whose rows have this order

    def __post_init__(self):
        if self.rotary not in KINDS:
            raise UserError(f"rotary={self.rotary!r} is unknown; choose one of {', '.join(KINDS)}")

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.width // self.heads


def attend(
    q: Float[Array, "R S heads hd"],
    k: Float[Array, "R KH P hd"],
    v: Float[Array, "R KH P hd"],
    mask: Bool[Array, "R S P"],
) -> Float[Array, "R S heads hd"]:
    """Returns scaled dot-product attention; keys and values have the head before the slot in memory.

    With this layout the products read the cache without a copy. ``jax.nn.dot_product_attention`` takes [R, P, KH, hd],
    for which XLA transposes the whole cache at every step; this more than doubles the time on a CPU. Queries get the
    same layout first, which makes gradients a third cheaper on a CPU. A single bfloat16 query is duplicated, because a
    CPU takes five times longer for one than for two (docs/LOG.md, 2026-11-26).
    """
    rows, length, heads, _ = q.shape
    sharing = heads // k.shape[1]  # queries that share one key
    grouped = q.reshape(rows, length, k.shape[1], sharing, -1).transpose(0, 2, 3, 1, 4)
    queries = grouped.reshape(rows, k.shape[1], sharing * length, -1)
    if sharing * length == 1 and q.dtype != jnp.float32:
        queries = jnp.repeat(queries, 2, axis=2)
    scores = products.einsum("rkad,rkpd->rkap", queries, k) * q.shape[-1] ** -0.5
    seen = jnp.tile(mask, (1, sharing, 1))[:, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
    y = products.einsum("rkap,rkpd->rkad", shares.astype(v.dtype), v).astype(q.dtype)
    return y[:, :, : sharing * length].reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, rngs, bias=False, init=nnx.initializers.normal(inputs**-0.5))


class Attention(nnx.Module):
    """Causal self-attention with an optional cache, and optional LoRA on queries and values."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = config.head_width
        queries, keys = config.heads * self.head_dim, config.kv_heads * self.head_dim
        if config.joined:
            self.qkv = _linear(config.width, queries + 2 * keys, rngs)
        else:
            self.q = _linear(config.width, queries, rngs)
            self.k = _linear(config.width, keys, rngs)
            self.v = _linear(config.width, keys, rngs)
        self.o = _linear(config.heads * self.head_dim, config.width, rngs)
        self.q_lora: Lora | None = nnx.data(None)
        self.v_lora: Lora | None = nnx.data(None)

    def add_lora(self, config: LoraConfig, rngs: nnx.Rngs) -> None:
        """Adds a fresh LoRA to the query projection and one to the value projection, in place."""
        width, wide = self.config.width, self.head_dim
        self.q_lora = nnx.data(Lora(width, self.config.heads * wide, config, rngs))
        self.v_lora = nnx.data(Lora(width, self.config.kv_heads * wide, config, rngs))

    def merge_lora(self) -> None:
        """Adds the LoRA to the projections' weights and removes it, in place."""
        joined = self.config.joined
        for linear, lora, from_end in (
            (self.qkv if joined else self.q, self.q_lora, False),
            (self.qkv if joined else self.v, self.v_lora, True),
        ):
            if lora is not None:
                added = lora.merged()
                rest = len(linear.weight[...]) - len(added)  # rows of the other projections in a joined weight
                added = jnp.pad(added, ((rest, 0) if from_end else (0, rest), (0, 0)))
                linear.weight[...] = (linear.weight[...] + added).astype(linear.weight.dtype)
        self.q_lora, self.v_lora = nnx.data(None), nnx.data(None)

    def _project(self, x: Float[Array, "R S D"]) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values before LoRA, [R, S, heads · hd] each."""
        if not self.config.joined:
            return self.q(x), self.k(x), self.v(x)
        queries, keys = self.config.heads * self.head_dim, self.config.kv_heads * self.head_dim
        q, k, v = jnp.split(self.qkv(x), (queries, queries + keys), axis=-1)
        return q, k, v

    def __call__(self, x, turn, mask, kv=None, slot=None, rngs=None):
        """Attends over x, or over ``kv`` after writing x at ``slot``; returns the output and (keys, values).

        Args:
          x: [R, S, D]; turn: rotation of its S tokens; mask: [R, S, P], True where a token can attend.
          kv: pair of [R, KH, P, hd]; None attends over x only, with P = S.
          rngs: random streams for LoRA's dropout; None = no dropout.
        """
        rows, length, _ = x.shape
        shape = (rows, length, -1, self.head_dim)
        q, k, v = self._project(x)
        if self.q_lora is not None and self.v_lora is not None:
            q, v = q + self.q_lora(x, rngs), v + self.v_lora(x, rngs)
        rotate = turn_halves if self.config.rotary == "tokens" else turn_neighbors
        q, k = rotate(q.reshape(shape), turn), rotate(k.reshape(shape), turn)
        k, v = k.swapaxes(1, 2), v.reshape(shape).swapaxes(1, 2)
        if kv is not None:
            k, v = (written(held, new, slot, 2) for held, new in zip(kv, (k, v), strict=True))
        return self.o(attend(q, k, v, mask).reshape(rows, length, -1)), (k, v)


class Mlp(nnx.Module):
    """A SwiGLU MLP."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.gate, self.up = (_linear(config.width, config.mlp, rngs) for _ in range(2))
        self.down = _linear(config.mlp, config.width, rngs)

    def __call__(self, x: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """A decoder layer: attention with pre-norm, a blender in some layers, and an MLP with pre-norm."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config, rngs)
        self.blender: Any = nnx.data(None)  # a Blender, or a FusedBlender in copies of ``Llama.fused``

    def attend(self, x, turn, mask, kv=None, slot=None, rngs=None):
        """Returns the normed input, which the blender uses, then x after attention, and (keys, values)."""
        normed = self.input_norm(x)
        y, kv = self.attention(normed, turn, mask, kv, slot, rngs)
        return normed, x + y, kv

    def feed_forward(self, x: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        """Returns x after the MLP."""
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """The decoder: embedding, layers and final norm. It has no text head, because no text is generated."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, faid: FaidConfig | None = None):
        self.config = config
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
        turn, mask, gates = self._turn(positions, width), _causal(filled), []
        for layer in self.layers:
            normed, x, _ = layer.attend(x, turn, mask, rngs=rngs)
            if features is not None and layer.blender is not None:
                # A position's own token follows the token that predicts it; the last position's is not in the input.
                hidden = jnp.pad(normed[:, x.shape[1] - height * width + 1 :], ((0, 0), (0, 1), (0, 0)))
                blended = layer.blender.blend_map(hidden.reshape(-1, height, width, hidden.shape[-1]), features)
                features, added = blended.features, blended.added
                if conditional is not None:
                    added = jnp.where(conditional[:, None, None], added, 0)
                x = x.at[:, -height * width :].add(added)
                gates.append(blended.gate)
            x = layer.feed_forward(x)
        return self.norm(x), jnp.stack(gates) if gates else jnp.zeros(0)

    def prefill(self, x: Float[Array, "R S D"], filled: Bool[Array, "R S"], cells: int, blended_rows: int) -> Cache:
        """Returns the cache of a left-padded prompt without its last token, with free slots for ``cells`` positions.

        Args:
          blended_rows: number of leading rows for which ``step`` receives features; 0 if it receives none.
        """
        first = filled.sum(axis=1, dtype=jnp.int32)
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        if self.config.rotary == "positions":  # the prompt has no places in the grid
            first, positions = jnp.full_like(first, -1), jnp.full_like(positions, -1)
        turn, mask = self._turn(positions, 1), _causal(filled)
        room = ((0, 0), (0, 0), (0, cells), (0, 0))
        keys, values, looked_at = [], [], []
        for layer in self.layers:
            if x.shape[1]:
                _, x, (k, v) = layer.attend(x, turn, mask)
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
        looked_at: list[Array] = []
        keys, values = [], []
        for layer, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            normed, x, (k, v) = layer.attend(x, turn, mask, (k, v), slot)
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


def _causal(filled: Bool[Array, "R S"]) -> Bool[Array, "R S S"]:
    """Returns the causal mask: earlier filled tokens, and the token itself, so that no row is empty and becomes NaN."""
    length = filled.shape[1]
    past, itself = jnp.tri(length, dtype=bool), jnp.eye(length, dtype=bool)
    return (past[None] & filled[:, None]) | itself[None]
