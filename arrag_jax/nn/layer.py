"""Defines a layer of a Llama decoder: attention with rotary positions, an MLP, and places for LoRA and blender."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from arrag_jax.errors import UserError
from arrag_jax.nn.cache import written
from arrag_jax.nn.linear import PRODUCT, Int8Linear, Linear
from arrag_jax.nn.lora import Lora, LoraConfig
from arrag_jax.nn.rotary import KINDS, turn_halves, turn_neighbors

# From queries [R, S, heads, hd], keys and values [R, KH, P, hd] to the heads' outputs [R, S, heads, hd].
Attend = Callable[[Array, Array, Array], Array]


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
                if isinstance(linear, Int8Linear):
                    raise UserError("a LoRA cannot be merged into weights in int8; load the model without int8")
                added = lora.merged()
                rest = len(linear.weight[...]) - len(added)  # rows of the other projections in a joined weight
                added = jnp.pad(added, ((rest, 0) if from_end else (0, rest), (0, 0)))
                merged: Any = (linear.weight[...] + added).astype(linear.weight.dtype)
                if isinstance(linear.weight[...], np.ndarray):  # an export's weights may not fit on one device
                    merged = np.array(merged)
                linear.weight.set_value(merged)
        self.q_lora, self.v_lora = nnx.data(None), nnx.data(None)

    def _project(self, x: Float[Array, "R S D"]) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values before LoRA, [R, S, heads · hd] each."""
        if not self.config.joined:
            return self.q(x), self.k(x), self.v(x)
        queries, keys = self.config.heads * self.head_dim, self.config.kv_heads * self.head_dim
        q, k, v = jnp.split(self.qkv(x), (queries, queries + keys), axis=-1)
        return q, k, v

    def __call__(self, x, turn, attend: Attend, kv=None, slot=None, rngs=None):
        """Attends over x, or over ``kv`` after writing x at ``slot``; returns the output and (keys, values).

        Args:
          x: [R, S, D]; turn: rotation of its S tokens; attend: the attention, with its mask.
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
        y = checkpoint_name(attend(q, k, v), PRODUCT)
        return self.o(y.reshape(rows, length, -1)), (k, v)


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

    def hold_in_int8(self) -> None:
        """Replaces the projections of attention and MLP by ``Int8Linear``, in place; LoRA and blender stay."""
        for part in (self.attention, self.mlp):
            for name, linear in list(vars(part).items()):
                if isinstance(linear, Linear):
                    setattr(part, name, Int8Linear(linear))

    def attend(self, x, turn, attend: Attend, kv=None, slot=None, rngs=None):
        """Returns the normed input, which the blender uses, then x after attention, and (keys, values)."""
        normed = self.input_norm(x)
        y, kv = self.attention(normed, turn, attend, kv, slot, rngs)
        return normed, x + y, kv

    def feed_forward(self, x: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        """Returns x after the MLP."""
        return x + self.mlp(self.mlp_norm(x))
