"""Encodes images to codes and decodes codes, for every model with a VQ tokenizer; validates the caller's arrays."""

import hashlib
import math
import operator
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike
from arrag_jax.mesh import on_own_device
from arrag_jax.models.weights import parameters
from arrag_jax.nn.vq import VQTokenizer

ROUNDING = 1e-3  # how far pixels may lie outside [-1, 1], because bfloat16 and resizing round
Model = TypeVar("Model", bound=Any)
NAMED = "gen_vision_model"  # prefix of parameter names in a fingerprint, the same for every model


class VQImages(nnx.Module):
    """Implements ``interfaces.ImageTokenizer`` with a ``VQTokenizer``.

    A subclass defines ``with_grid`` and these attributes.

    Attributes:
      vq: the module of the tokenizer.
      grid: height and width in codes.
      codebook_size: V, the number of codes.
      image_size: height and width of an image of this grid in pixels.
    """

    if TYPE_CHECKING:  # some models hold these, others work them out

        @property
        def vq(self) -> VQTokenizer: ...

        @property
        def grid(self) -> tuple[int, int]: ...

        @property
        def codebook_size(self) -> int: ...

        @property
        def image_size(self) -> tuple[int, int]: ...

        def with_grid(self, grid: ArrayLike) -> "VQImages": ...

    @property
    def codebook(self) -> Float[Array, "V C"]:
        """The l2-normalised codebook."""
        return self.vq.codebook

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer: the first sixteen hex digits of the SHA-256 of its parameters in float32.

        Models with the same fingerprint map images to the same codes and codes to the same vectors.
        """
        digest = hashlib.sha256()
        for name, value in sorted(parameters(self.vq).items()):
            digest.update(f"{NAMED}.{name}".encode())
            digest.update(np.ascontiguousarray(np.asarray(value[...], np.float32)).tobytes())
        return digest.hexdigest()[:16]

    def encode_images(self, images: ArrayLike) -> tuple[Int[Array, "B T"], Float[Array, "B H W C"]]:
        """Returns codes in raster order, and l2-normalised latents before quantisation.

        Args:
          images: float [B, h, w, 3], pixels in [-1, 1]; height and width are multiples of the tokenizer's downsampling.

        Raises:
          UserError: if height or width is no such multiple, or pixels are integers, NaN or outside [-1, 1].
        """
        require_own_process()
        images = images if isinstance(images, Array) else np.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images must be floats in [-1, 1], got {images.dtype}; scale 0 … 255 by x / 127.5 - 1")
        images, scale = jnp.asarray(images, jnp.float32), self.vq.config.downsampling
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % scale or images.shape[2] % scale:
            raise UserError(f"images must be [B, h, w, 3] with h and w multiples of {scale}, got {images.shape}")
        _check_pixels(images)
        codes, latents = _encode(*nnx.split(self.vq), images)
        return codes.reshape(len(images), -1), latents

    def decode_codes(self, codes: ArrayLike, height: SupportsIndex, width: SupportsIndex) -> Float[Array, "B h w 3"]:
        """Returns the pixels, in [-1, 1], of a grid of height x width codes.

        Raises:
          UserError: if the codes do not fill that grid, or are not codes of this codebook.
        """
        require_own_process()
        codes = codes if isinstance(codes, jax.core.Tracer) else np.asarray(codes)
        height, width = operator.index(height), operator.index(width)
        if codes.ndim != 2 or codes.shape[1] != height * width:
            raise UserError(f"codes must be [B, {height * width}] for a {height} x {width} grid, got {codes.shape}")
        check_ids("codes", codes, self.codebook_size)
        grid = jnp.asarray(codes, jnp.int32).reshape(-1, height, width)
        return jnp.clip(_decode(*nnx.split(self.vq), grid), -1.0, 1.0)


def with_whole_tokenizer(model: Model, mesh: Mesh) -> Model:
    """Returns a model whose image tokenizer is whole on one device of each process; the other parts are shared.

    A tokenizer has few parameters (72M in Janus-Pro), and pixels that one device decodes do not depend on the mesh.
    """
    copy = nnx.merge(*nnx.split(model))
    graph, state = nnx.split(copy.vq)
    copy.gen_vision_model = nnx.data(nnx.merge(graph, on_own_device(state, mesh)))
    return copy


def check_ids(name: str, ids: ArrayLike, size: int, lowest: int = 0) -> None:
    """Raises UserError unless ids are integers in [lowest, size); the values of tracers cannot be checked."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} must be integers, got {ids.dtype}")
    if not isinstance(ids, jax.core.Tracer) and ids.size and (ids.min() < lowest or ids.max() >= size):
        raise UserError(f"{name} must lie in [{lowest}, {size}), got {ids.min()} … {ids.max()}")


def _check_pixels(images: Array) -> None:
    """Raises UserError unless pixels lie in [-1, 1] up to ``ROUNDING``; the values of tracers cannot be checked."""
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    low, high = float(images.min()), float(images.max())
    if math.isnan(low) or math.isnan(high):
        raise UserError("images hold NaN; pixels must be numbers in [-1, 1]")
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise UserError(
            f"images must be floats in [-1, 1], got {low:g} … {high:g}; scale 0 … 255 by x / 127.5 - 1, 0 … 1 by 2x - 1"
        )


# Compiled once per shape. The tokenizer is passed as (graphdef, state), so its arrays are arguments, not constants.


@jax.jit(static_argnums=0)
def _encode(graph, state, images):
    return nnx.merge(graph, state).encode(images)


@jax.jit(static_argnums=0)
def _decode(graph, state, codes):
    return nnx.merge(graph, state).decode_codes(codes)
