"""Defines the linear layers and the embedding that all modules except the tokenizer use."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int8

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


class Int8Linear(nnx.Module):
    """A ``Linear`` without bias that holds its weight as int8 [O, I], with a float32 scale for each output.

    A product with the integers, which bfloat16 holds exactly, is multiplied by the scales afterwards. So XLA can
    convert a weight while it reads it, and need not write a larger copy to main memory. It has no gradient.
    """

    def __init__(self, linear: Linear):
        """Creates the layer of a linear layer's weight, or of the shape of one."""
        weight = linear.weight.get_value()
        if isinstance(weight, jax.ShapeDtypeStruct):
            held: Any = jax.ShapeDtypeStruct(weight.shape, jnp.int8)
            scale: Any = jax.ShapeDtypeStruct(weight.shape[:1], jnp.float32)
        else:
            held, scale = map(jnp.asarray, quantized(np.asarray(weight, np.float32)))
        self.weight, self.scale = nnx.Param(held), nnx.Param(scale)

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        y = products.linear(x, self.weight[...].astype(x.dtype))
        y = y * self.scale[...].reshape((1,) * (y.ndim - 1) + (-1,))
        return checkpoint_name(y.astype(x.dtype), PRODUCT)


def quantized(weight: Float[np.ndarray, "O I"]) -> tuple[Int8[np.ndarray, "O I"], Float[np.ndarray, " O"]]:
    """Returns a weight as integers from -127 to 127 and the scale of each output.

    A scale is the largest magnitude of its row over 127, so that a number changes by at most half a scale.
    """
    scale = np.abs(weight).max(1) / np.float32(127)
    scale[scale == 0] = 1  # a row of zeros
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def embedding(count: int, width: int, rngs: nnx.Rngs, init: jax.nn.initializers.Initializer | None = None) -> nnx.Embed:
    """Returns an embedding of ``count`` rows whose outputs have the dtype of its table.

    By default, the outputs of ``nnx.Embed`` have the dtype that it was created with, float32, even if a bfloat16 table
    was loaded later. Then a bfloat16 model would compute all its layers in float32.
    """
    more: dict[str, Any] = {} if init is None else {"embedding_init": init}
    return nnx.Embed(count, width, promote_dtype=_as_held, rngs=rngs, **more)


def _as_held(arrays: Held, /, **_: Any) -> Held:
    return arrays
