"""Defines LoRA, a low-rank correction of a frozen linear layer (Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.errors import UserError
from arrag_jax.fields import Settings
from arrag_jax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class LoraConfig(Settings):
    """Settings of LoRA, whose correction is α/r · B·A."""

    rank: int = 128  # rank r of the correction
    alpha: float = 256.0  # α; the correction is scaled by α/r
    dropout: float = 0.05  # share of the correction's inputs that training drops

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's rank={self.rank} must be at least 1 and its dropout={self.dropout} in [0, 1)")


class Lora(nnx.Module):
    """The correction (α/r) · B A dropout(x). B starts at zero, so training starts with the outputs of the base."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig, rngs: nnx.Rngs):
        self.config = config
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as the official code, through PEFT
        self.a = Linear(inputs, config.rank, rngs, bias=False, init=uniform)
        self.b = Linear(config.rank, outputs, rngs, bias=False, init=nnx.initializers.zeros)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "R S I"], rngs: nnx.Rngs | None = None) -> Float[Array, "R S O"]:
        """Returns the correction; dropout is applied only if ``rngs`` is given."""
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.b(self.a(x)) * (self.config.alpha / self.config.rank)

    def merged(self) -> Float[Array, "O I"]:
        """Returns the correction as one matrix, which can be added to the layer's weight."""
        return jnp.dot(self.b.weight[...], self.a.weight[...]) * (self.config.alpha / self.config.rank)
