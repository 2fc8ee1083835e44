"""Runs equal layers one after the other as one ``lax.scan`` over their stacked weights.

XLA compiles the layer once, however many there are. The weights stay one variable per layer and are stacked inside the
program. So loading, saving, LoRA and decoding know nothing of it, and a device adds its own share of the frozen weights
in the dtype of the computation to what it holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from arrag_jax.nn.linear import PRODUCT

# What the forward pass keeps of a layer for the backward pass, which computes the rest again: by ``TrainConfig.remat``.
POLICIES = {
    "none": None,  # keeps everything
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
States = Float[Array, "R S D"]


Step = Callable[..., Any]  # from a layer, its inputs and its random streams for dropout (None = no dropout) to outputs


def single(layer: nnx.Module, step: Step, inputs: tuple[Array, ...], key: Key[Array, ""] | None, kind: str) -> Any:
    """Returns ``step(layer, *inputs, rngs)``.

    Args:
      key: for dropout; None = no dropout.
      kind: names one of ``POLICIES``.
    """
    graph, state = nnx.split(layer)

    def run(state: Any, key: Array | None, *inputs: Array) -> Any:
        return step(nnx.merge(graph, state), *inputs, None if key is None else nnx.Rngs(key))

    # Outside a scan, XLA would otherwise merge what is computed again with what was computed before.
    return (run if kind == "none" else jax.checkpoint(run, policy=POLICIES[kind]))(state, key, *inputs)


def scanned(
    layers: Sequence[nnx.Module], step: Step, x: States, keys: Key[Array, " layers"] | None, kind: str
) -> States:
    """Returns x after all layers; each one's output is ``step(layer, x, rngs)``.

    Args:
      layers: modules with equal graphs and shapes.
      x: the first layer's input.
      keys, kind: as in ``single``, one key per layer.
    """
    if not layers:
        return x
    (graph, *_), states = zip(*(nnx.split(layer) for layer in layers), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def one_layer(x: States, part: tuple[Any, Any]) -> tuple[States, None]:
        state, key = part
        return step(nnx.merge(graph, state), x, None if key is None else nnx.Rngs(key)), None

    if kind != "none":
        one_layer = jax.checkpoint(one_layer, policy=POLICIES[kind], prevent_cse=False)
    return jax.lax.scan(one_layer, x, (stacked, keys))[0]
