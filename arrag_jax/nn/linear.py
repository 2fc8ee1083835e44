"""Defines the linear layer and the embedding that all modules except the tokenizer use."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from arrag_jax.ops import products

Held = TypeVar("Held", bound=tuple[Any, ...])
PRODUCT = "product"  # name of the arrays that ``remat="dots"`` keeps for the backward pass (``nn.depth``)


class Linear(nnx.Module):
    """A linear layer from [..., I] to [..., O].

    The weight is [O, I], as in PyTorch and the published checkpoints. The kernel of ``nnx.Linear`` is [I, O]; for the
    reason to differ see ``ops.products.linear``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Callable[..., Array] | None = None,
    ):
        """Creates the layer; ``init`` is called with the shape [I, O], as in flax; None = flax's default."""
        init = nnx.initializers.lecun_normal() if init is None else init
        self.weight = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32).T)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        y = checkpoint_name(products.linear(x, self.weight[...]).astype(x.dtype), PRODUCT)
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def embedding(count: int, width: int, rngs: nnx.Rngs, init: jax.nn.initializers.Initializer | None = None) -> nnx.Embed:
    """Returns an embedding of ``count`` rows whose outputs have the dtype of its table.

    By default, the outputs of ``nnx.Embed`` have the dtype that it was created with, float32, even if a bfloat16 table
    was loaded later. Then a bfloat16 model would compute all its layers in float32.
    """
    more: dict[str, Any] = {} if init is None else {"embedding_init": init}
    return nnx.Embed(count, width, promote_dtype=_as_held, rngs=rngs, **more)


def _as_held(arrays: Held, /, **_: Any) -> Held:
    return arrays
