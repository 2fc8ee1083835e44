"""Defines FAiD's blender, which adds retrieved features to hidden states, scaled by a learned gate.

A blender combines each retrieved feature with the hidden states around a position. It has the parameters of the
official code, and evaluates them in the cheaper form of ``ops.blend``. Source: docs/reference.md "FAiD".
"""

import dataclasses
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.fields import Settings
from arrag_jax.mesh import devices_in_context, gathered, shares_of, split_axis
from arrag_jax.nn.linear import Linear
from arrag_jax.ops import blend, products
from arrag_jax.ops.grid import has_context


@dataclasses.dataclass(frozen=True)
class FaidConfig(Settings):
    """Settings of the blenders.

    Attributes:
      stride: layers whose number is a multiple of this have a blender; the published configs call this
        ``num_SmoothPatchBlender``.
      hops: non-empty subset of {1, 2, 3}; hop h uses a window of (2h+1) x (2h+1) positions.
      neighbors: K, the number of neighbours per position; empty slots count in the mean.
    """

    stride: int = 12
    hops: tuple[int, ...] = (1, 2)
    neighbors: int = 10

    def __post_init__(self):
        if not self.hops or sorted(set(self.hops)) != list(self.hops) or not set(self.hops) <= {1, 2, 3}:
            raise UserError(f"hops={list(self.hops)} must be a non-empty rising subset of 1, 2, 3")
        if self.stride < 1 or self.neighbors < 1:
            raise UserError(f"stride={self.stride} and neighbors={self.neighbors} must be at least 1")


class Blended(NamedTuple):
    """The output of a blender.

    Attributes:
      added: mean over the K slots, which is added to the residual stream.
      features: new features of each slot, the input of the next blender.
      gate: mean of the gate, a metric of training.
    """

    added: Float[Array, "*cells D"]
    features: Float[Array, "*cells K D"]
    gate: Float[Array, ""]


class HopConv(nnx.Module):
    """The parameters of one k x k convolution, which is never run as a convolution."""

    def __init__(self, kernel: int, width: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kaiming(rngs, (kernel, kernel, width, width)))
        self.bias = nnx.Param(jnp.zeros(width))


class Blender(nnx.Module):
    """A blender for training: a norm of the incoming features, convolutions of every hop, and a gate.

    The initialisation is that of the official code: kaiming-normal kernels, zero biases and equal weights of the hops.
    So a fresh blender changes the model's output. With ``start_silent`` the second convolutions start at zero, and the
    model starts with the outputs of its base.
    """

    def __init__(self, config: FaidConfig, width: int, eps: float, rngs: nnx.Rngs, start_silent: bool = False):
        self.config = config
        self.norm = nnx.RMSNorm(width, epsilon=eps, use_scale=False, rngs=rngs)
        self.norm_scale = nnx.Param(jnp.ones(width))
        for hop in config.hops:
            setattr(self, f"conv{hop}", HopConv(hop + 1, width, rngs))
            setattr(self, f"conv{hop}2", HopConv(hop + 1, width, rngs))
            if start_silent:
                silent = getattr(self, f"conv{hop}2").kernel
                silent[...] = jnp.zeros_like(silent[...])
        # The official module has no such weights if there is only one hop.
        self.conv_weights = nnx.Param(jnp.ones(len(config.hops))) if len(config.hops) > 1 else None
        self.gate = nnx.List([Linear(width, out, rngs, init=_kaiming_dense) for out in (width, 1)])

    def kernels(self) -> tuple[list[blend.HopKernels], Float[Array, " hops"]]:
        """Returns the convolutions of every hop, and the weights of the hops after softmax."""
        convs = [(getattr(self, f"conv{hop}"), getattr(self, f"conv{hop}2")) for hop in self.config.hops]
        kernels = [blend.HopKernels(a.kernel[...], a.bias[...], b.kernel[...], b.bias[...]) for a, b in convs]
        if self.conv_weights is None:
            return kernels, jnp.ones(1)
        return kernels, jax.nn.softmax(self.conv_weights[...].astype(jnp.float32))

    def blend_map(self, hidden: Float[Array, "B H W D"], features: Float[Array, "B T K D"]) -> Blended:
        """Returns the blend of all positions of B maps.

        Args:
          hidden: normed hidden states of the positions; a position uses only those before it.
          features: incoming features; those of positions without a context count as zeros.
        """
        batch, height, width, dim = hidden.shape
        (kernels, weights), shares = self.kernels(), shares_of(dim)
        kernels = [x._replace(first=split_axis(x.first, 2), second=gathered(x.second)) for x in kernels]
        positions = batch * height * width // devices_in_context()
        if blend.cheaper_composed(self.config.hops, positions, dim, shares):
            offsets = blend.live_offsets(max(self.config.hops))
            matrices = gathered(split_axis(blend.compose(kernels, weights), 1))
            around = blend.around_composed(matrices, offsets, hidden)
        else:
            around = blend.around_staged(kernels, weights, hidden)
        complete = jnp.asarray(has_context(height, width))[None, :, None, None]
        incoming = jnp.where(complete, self.norm(features), 0.0)
        return _gated(self.gate, around.reshape(batch, -1, dim), incoming, self.centre(kernels, weights))

    def fuse(self) -> "FusedBlender":
        """Returns the same blender with precomputed kernels, for decoding one position at a time.

        The result is cached until a weight changes, because computing it costs as much as about thirty decoding steps
        at the 1B shape.
        """
        graph, state = nnx.split(self)
        arrays = jax.tree.leaves(state)
        kept = _FUSED.get(self)
        if kept is None or any(known() is not array for known, array in zip(kept[0], arrays, strict=True)):
            kept = _FUSED[self] = ([weakref.ref(array) for array in arrays], nnx.merge(*_fuse(graph, state)))
        return kept[1]

    def centre(self, kernels: list[blend.HopKernels], weights: Float[Array, " hops"]) -> blend.Centre:
        """Returns the centre's term with the norm's scale multiplied into its columns.

        The scale is not applied to the features, so no gradient is computed for features that need none.
        """
        matrix, bias = blend.centre(kernels, weights, shares_of(len(self.norm_scale[...])) > 1)
        return blend.Centre(gathered(split_axis(self.norm_scale[...][None] * matrix, 1)), bias)


class FusedBlender(nnx.Module):
    """A blender for decoding: one matrix per live offset of the window, one for the centre, and the gate."""

    def __init__(self, blender: Blender):
        kernels, weights = blender.kernels()
        self.config, self.norm, self.gate = blender.config, blender.norm, blender.gate
        around = blend.compose(kernels, weights)
        self.around = nnx.Param(around.reshape(-1, around.shape[-1]).T)  # [D, nD]
        self.matrix, self.bias = map(nnx.Param, blender.centre(kernels, weights))

    def blend_position(
        self, window: Float[Array, "B n D"], features: Float[Array, "B K D"], complete: Bool[Array, " B"]
    ) -> Blended:
        """Returns the blend of one position in each of B maps.

        Args:
          window: hidden states at ``live_offsets``, zero outside the map.
          features: incoming features.
          complete: which positions have a complete context.
        """
        around = products.linear(window.reshape(len(window), -1), self.around[...])
        incoming = jnp.where(complete[:, None, None], self.norm(features), 0.0)
        return _gated(self.gate, around, incoming, blend.Centre(self.matrix[...], self.bias[...]))

    def blend_window(
        self,
        past: Float[Array, "B slots D"],
        places: Int[Array, "n S"],
        grid: tuple[int, int],
        features: Float[Array, "B S K D"],
    ) -> Blended:
        """Returns the blend of S positions per map; their windows are gathered from the hidden states so far.

        Args:
          past: hidden states; slot t + 1 belongs to position t.
          places: the positions: once for all maps, or once per map.
        """
        batch, length = features.shape[:2]
        places = jnp.broadcast_to(places, (batch, length))
        window = jnp.asarray(window_positions(self.config.hops, *grid))[places]
        around = jax.vmap(lambda past, window: past[window + 1])(past, window)
        around = jnp.where(window[..., None] >= 0, around, 0).reshape(batch * length, -1, past.shape[-1])
        complete = jnp.asarray(has_context(*grid))[places].reshape(-1)
        blended = self.blend_position(around, features.reshape(batch * length, *features.shape[2:]), complete)
        added, features = (y.reshape(batch, length, *y.shape[1:]) for y in blended[:2])
        return blended._replace(added=added, features=features)


# Cache of ``Blender.fuse``: by blender, weak references to its arrays and the fused blender made from them.
_FUSED: weakref.WeakKeyDictionary[Blender, tuple[list[weakref.ref], FusedBlender]] = weakref.WeakKeyDictionary()


@jax.jit(static_argnums=0)
def _fuse(graph, state):
    return nnx.split(FusedBlender(nnx.merge(graph, state)))


def _gated(gate: nnx.List, around: Array, incoming: Array, centre: blend.Centre) -> Blended:
    """Returns the gated affine value of every slot.

    Args:
      around: the window's term, float32 [..., D].
      incoming: normed features of the slots, [..., K, D].
    """
    value = products.linear(incoming, centre.matrix)
    around = around + centre.bias.reshape((1,) * (around.ndim - 1) + (-1,))
    value = (value + around[..., None, :]).astype(incoming.dtype)
    enter, leave = gate
    opened = jax.nn.sigmoid(leave(jax.nn.relu(enter(value))))
    # Products replace broadcasts, so that the gate's gradient is also a product; a CPU is slow at reductions.
    added = (products.einsum("...kd,...k->...d", value, opened[..., 0]) / value.shape[-2]).astype(value.dtype)
    across = products.einsum("...k,kd->...d", opened, jnp.ones_like(value, shape=(1, value.shape[-1])))
    return Blended(added, value * across.astype(value.dtype), jnp.mean(opened))


def window_positions(hops: tuple[int, ...], height: int, width: int) -> Int[np.ndarray, "T n"]:
    """Returns the raster indices of each position's window, in the order of ``live_offsets``; -1 outside the map."""
    rows, columns = np.divmod(np.arange(height * width)[:, None], width)
    steps = np.array(blend.live_offsets(max(hops)))
    row, column = rows + steps[None, :, 0], columns + steps[None, :, 1]
    inside = (row >= 0) & (column >= 0) & (column < width)
    return np.where(inside, row * width + column, -1).astype(np.int32)


def _kaiming_dense(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jax.random.normal(key, shape, dtype) * (2 / np.prod(shape[:-1])) ** 0.5


def _kaiming(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    return _kaiming_dense(rngs.params(), shape)
