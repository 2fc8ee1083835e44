"""The linear layer and the embedding of all modules but the tokenizer."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.ops import products

Held = TypeVar("Held", bound=tuple[Any, ...])


class Linear(nnx.Module):
    """x [..., I] → [..., O]. The weight is [O, I], as PyTorch and the published checkpoints hold it.

    Not ``nnx.Linear``, whose kernel is [I, O]: see ``ops.products.linear``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Callable[..., Array] | None = None,
    ):
        """``init`` takes shapes [I, O], for which flax's initializers are made; None = flax's own for linear layers."""
        init = nnx.initializers.lecun_normal() if init is None else init
        self.weight = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32).T)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        y = products.linear(x, self.weight[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def embedding(count: int, width: int, rngs: nnx.Rngs, init: jax.nn.initializers.Initializer | None = None) -> nnx.Embed:
    """A table of ``count`` rows, looked up in the type that it is held in.

    Left alone, ``nnx.Embed`` looks up in the type it was made with, float32, whatever was loaded into it since; and
    what follows the first look-up of a bfloat16 model would all be computed in float32.
    """
    more: dict[str, Any] = {} if init is None else {"embedding_init": init}
    return nnx.Embed(count, width, promote_dtype=_as_held, rngs=rngs, **more)


def _as_held(arrays: Held, /, **_: Any) -> Held:
    return arrays
