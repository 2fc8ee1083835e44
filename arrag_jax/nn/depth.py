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

from arrag_jax.mesh import GATHERED, devices_in_context, gathered
from arrag_jax.nn.linear import PRODUCT

# What the forward pass keeps of a layer for the backward pass, which computes the rest again: by ``TrainConfig.remat``.
POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
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
        return step(nnx.merge(graph, _on_every_device(state)), *inputs, None if key is None else nnx.Rngs(key))

    # Outside a scan, XLA would otherwise merge what is computed again with what was computed before.
    return (run if _keeps_all(kind) else jax.checkpoint(run, policy=POLICIES[kind]))(state, key, *inputs)


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
        return step(nnx.merge(graph, _on_every_device(state)), x, None if key is None else nnx.Rngs(key)), None

    if not _keeps_all(kind):
        one_layer = jax.checkpoint(one_layer, policy=POLICIES[kind], prevent_cse=False)
    return jax.lax.scan(one_layer, x, (stacked, keys))[0]


def _on_every_device(state: Any) -> Any:
    """Returns a layer's weights whole on every device, as long as the layer runs.

    The kernels of a blender's convolutions stay split: ``nn.faid.Blender`` shares the work on them among the devices.
    """
    if devices_in_context() == 1:
        return state

    def whole(path: Any, leaf: Array) -> Array:
        return leaf if "conv" in jax.tree_util.keystr(path) else gathered(leaf)

    return jax.tree_util.tree_map_with_path(whole, state)


def _keeps_all(kind: str) -> bool:
    """Returns whether nothing is computed again; on several devices weights are always gathered again."""
    return kind == "none" and devices_in_context() == 1
