"""LoRA: a low-rank correction beside a frozen linear layer (Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.errors import UserError
from arrag_jax.ops import products


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank r, scale α (the correction is α/r times B·A) and dropout of the correction's input."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's rank={self.rank} must be at least 1 and its dropout={self.dropout} in [0, 1)")


class Lora(nnx.Module):
    """x → (α/r) · B A dropout(x). B starts at zero, so that training starts from the base."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig, rngs: nnx.Rngs):
        self.config = config
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # the official code's, through PEFT
        self.a = nnx.Linear(
            inputs, config.rank, use_bias=False, kernel_init=uniform, dot_general=products.linear, rngs=rngs
        )
        zeros = nnx.initializers.zeros
        self.b = nnx.Linear(
            config.rank, outputs, use_bias=False, kernel_init=zeros, dot_general=products.linear, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "R S I"], rngs: nnx.Rngs | None = None) -> Float[Array, "R S O"]:
        """The correction; dropout only where ``rngs`` are given."""
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.b(self.a(x)) * (self.config.alpha / self.config.rank)

    def merged(self) -> Float[Array, "I O"]:
        """The correction as one matrix, to be added to the layer's kernel."""
        return jnp.dot(self.a.kernel[...], self.b.kernel[...]) * (self.config.alpha / self.config.rank)
