"""Llama decoder blocks (RMSNorm, rotary positions, SwiGLU, grouped-query attention) with a KV cache.

The layers are unrolled, not scanned: on a CPU, slicing stacked weights copies them at every step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the decoder; the defaults are Janus-Pro-1B's."""

    vocab_size: int = 102400
    width: int = 2048
    layers: int = 24
    heads: int = 16
    kv_heads: int = 16
    mlp: int = 5632
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


class Cache(NamedTuple):
    """Keys and values of all layers, and which slots hold a token.

    The P = L - 1 + T slots are the prompt without its last token, then the cells.

    Attributes:
      keys, values: one array a layer.
      filled: slots that may be attended.
      length: real tokens of each row's prompt; slot L - 1 + t stands at position length - 1 + t.
    """

    keys: tuple[Float[Array, "R P KH hd"], ...]
    values: tuple[Float[Array, "R P KH hd"], ...]
    filled: Bool[Array, "R P"]
    length: Int[Array, " R"]


def rotate(x: Float[Array, "R S heads hd"], positions: Int[Array, "R S"], theta: float) -> Float[Array, "R S heads hd"]:
    """Rotary position embedding, in the half-split form of Llama."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(inputs**-0.5)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention; writes into the cache when it is given one."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = config.width // config.heads
        self.q = _linear(config.width, config.heads * self.head_dim, rngs)
        self.k = _linear(config.width, config.kv_heads * self.head_dim, rngs)
        self.v = _linear(config.width, config.kv_heads * self.head_dim, rngs)
        self.o = _linear(config.heads * self.head_dim, config.width, rngs)

    def __call__(self, x, positions, mask, kv=None, slot=None):
        """Attends over x itself, or over ``kv`` after writing x at ``slot``; returns output and (keys, values).

        Args:
          x: [R, S, D]; positions: [R, S]; mask: [R, S, P], True = may be attended.
          kv: pair of [R, P, KH, hd], or None (then P = S).
        """
        rows, length, _ = x.shape
        shape = (rows, length, -1, self.head_dim)
        q = rotate(self.q(x).reshape(shape), positions, self.config.rope_theta)
        k = rotate(self.k(x).reshape(shape), positions, self.config.rope_theta)
        v = self.v(x).reshape(shape)
        if kv is not None:
            k = jax.lax.dynamic_update_slice_in_dim(kv[0], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(kv[1], v, slot, axis=1)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return self.o(y.reshape(rows, length, -1)), (k, v)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.gate, self.up = (_linear(config.width, config.mlp, rngs) for _ in range(2))
        self.down = _linear(config.mlp, config.width, rngs)

    def __call__(self, x: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x, positions, mask, kv=None, slot=None):
        y, kv = self.attention(self.input_norm(x), positions, mask, kv, slot)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv


class Llama(nnx.Module):
    """Embedding, layers, final norm. Text logits are never needed here, so there is no text head."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(config.width**-0.5)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.width, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)

    def forward(
        self, x: Float[Array, "R S D"], positions: Int[Array, "R S"], filled: Bool[Array, "R S"]
    ) -> Float[Array, "R S D"]:
        """Whole sequences at once; a token attends to the filled ones not after it."""
        for layer in self.layers:
            x, _ = layer(x, positions, _causal(filled))
        return self.norm(x)

    def prefill(self, x: Float[Array, "R S D"], filled: Bool[Array, "R S"], cells: int) -> Cache:
        """Runs a left-padded prompt (without its last token) and keeps room for ``cells`` more."""
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        room = ((0, 0), (0, cells), (0, 0), (0, 0))
        keys, values = [], []
        for layer in self.layers:
            x, (k, v) = layer(x, positions, _causal(filled))
            keys.append(jnp.pad(k, room))
            values.append(jnp.pad(v, room))
        length = filled.sum(axis=1, dtype=jnp.int32) + 1
        return Cache(tuple(keys), tuple(values), jnp.pad(filled, ((0, 0), (0, cells))), length)

    def step(
        self, x: Float[Array, "R D"], cache: Cache, cell: Int[Array, ""], cells: int
    ) -> tuple[Float[Array, "R D"], Cache]:
        """One token a row, at the slot of ``cell``; returns the normed hidden state."""
        slot = cache.filled.shape[1] - cells + cell
        filled = jax.lax.dynamic_update_slice_in_dim(cache.filled, jnp.ones((x.shape[0], 1), bool), slot, axis=1)
        positions = (cache.length - 1 + cell)[:, None]
        x, keys, values = x[:, None], [], []
        for layer, k, v in zip(self.layers, cache.keys, cache.values, strict=True):
            x, (k, v) = layer(x, positions, filled[:, None], (k, v), slot)
            keys.append(k)
            values.append(v)
        return self.norm(x)[:, 0], Cache(tuple(keys), tuple(values), filled, cache.length)


def _causal(filled: Bool[Array, "R S"]) -> Bool[Array, "R S S"]:
    """Earlier filled tokens and the token itself (so that a pad's row is never empty, hence never NaN)."""
    length = filled.shape[1]
    past, itself = jnp.tri(length, dtype=bool), jnp.eye(length, dtype=bool)
    return (past[None] & filled[:, None]) | itself[None]
