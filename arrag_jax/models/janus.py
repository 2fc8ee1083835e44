"""Janus: a Llama decoder that reads text tokens and writes image codes.

Source: docs/reference.md "Backbone". Image codes enter through ``gen_embed`` and ``gen_aligner``,
image logits leave through ``gen_head``. Padding never changes a result: positions count real tokens
only, and pads are never attended (the reference counts them; docs/reference.md quirk 17).
"""

import itertools
import math
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.presets import JanusConfig
from arrag_jax.nn.linear import Linear, embedding
from arrag_jax.nn.transformer import Cache, Llama
from arrag_jax.nn.vq import VQTokenizer

PARTS = ("language_model", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head")
VISION = ("gen_vision_model",)  # the tokenizer alone
ROUNDING = 1e-3  # by which pixels may lie outside [-1, 1]: what bfloat16 or a resized image may add


class Projector(nnx.Module):
    """Linear layers with exact GELU between them: the aligner, and the head."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([Linear(a, b, rngs) for a, b in pairs])

    def __call__(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims O"]:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else jax.nn.gelu(x, approximate=False))
        return x


class Janus(nnx.Module):
    """The backbone (``interfaces.Backbone``) together with its VQ tokenizer."""

    def __init__(self, config: JanusConfig, rngs: nnx.Rngs, parts: tuple[str, ...] = PARTS):
        """Builds the named parts; the others are None (a tokenizer alone needs no language model)."""
        language, vision = config.language, config.vision
        self.config = config
        makers = {
            "language_model": lambda: Llama(language, rngs, config.faid),
            "gen_vision_model": lambda: VQTokenizer(vision, rngs),
            "gen_embed": lambda: embedding(vision.codebook_size, vision.code_dim, rngs),
            "gen_aligner": lambda: Projector((vision.code_dim, *[language.width] * config.aligner_depth), rngs),
            "gen_head": lambda: Projector((language.width, config.head_width, vision.codebook_size), rngs),
        }
        for name, make in makers.items():
            setattr(self, name, nnx.data(make()) if name in parts else None)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        return self.config.grid

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.config.vision.codebook_size

    @property
    def blended_neighbors(self) -> int:
        """K of FAiD's blenders; 0: the model has none."""
        return self.config.faid.neighbors if self.config.faid else 0

    @property
    def codebook(self) -> Float[Array, "V C"]:
        """The tokenizer's l2-normalised codebook."""
        return self.gen_vision_model.codebook

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Embeddings of image codes as the language model takes them."""
        return self.gen_aligner(self.gen_embed(codes))

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """What FAiD's first blender takes: embeddings of retrieved codes, zeros for the absent (-1)."""
        return jnp.where(neighbors[..., None] >= 0, self.embed_codes(jnp.maximum(neighbors, 0)), 0)

    def with_grid(self, grid: ArrayLike) -> "Janus":
        """The same model over another grid (height, width): it shares every parameter.

        Raises:
          UserError: ``grid`` is no grid.
        """
        other = type(self)(self.config.with_grid(grid), nnx.Rngs(0), parts=())
        for name in PARTS:
            setattr(other, name, nnx.data(getattr(self, name)))
        return other

    def fused(self) -> "Janus":
        """A copy for drawing with FAiD: it shares every array, its blenders' kernels are multiplied out."""
        copy = nnx.merge(*nnx.split(self))
        copy.language_model = nnx.data(self.language_model.fused())
        return copy

    def prefill(
        self, prompt_ids: Int[Array, "R L"], prompt_mask: Bool[Array, "R L"], blended_rows: int = 0
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Reads the prompt but for its last token, whose embedding is the input of cell 0."""
        ids, mask = left_pad(prompt_ids, prompt_mask)
        x = self.language_model.embed_tokens(ids)
        cells = self.grid[0] * self.grid[1]
        return x[:, -1], self.language_model.prefill(x[:, :-1], mask[:, :-1], cells, blended_rows)

    def step(
        self,
        hidden: Float[Array, "R D"],
        cache: Cache,
        cell: Int[Array, ""],
        features: Float[Array, "B K D"] | None = None,
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Logits of the code at ``cell``, given the embedding of what came just before it."""
        hidden, cache = self.language_model.step(hidden, cache, cell, self.grid, features)
        return self.gen_head(hidden).astype(jnp.float32), cache

    def teacher_forced(
        self,
        prompt_ids: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of all cells at once; row t predicts ``codes[:, t]``.

        Args:
          neighbors: retrieved codes, -1 where absent; None = FAiD's blenders, if any, are passed over.
        """
        return self.forward(prompt_ids, prompt_mask, codes, neighbors)[0]

    def forward(
        self,
        prompt_ids: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T V"], Float[Array, " blenders"]]:
        """``teacher_forced`` as training needs it: also each blender's mean gate.

        Args:
          conditional: rows that still have their caption; blenders are silent in the others.
          rngs: for dropout; None = none.
        """
        ids, mask = left_pad(prompt_ids, prompt_mask)
        x = jnp.concatenate([self.language_model.embed_tokens(ids), self.embed_codes(codes[:, :-1])], axis=1)
        filled = jnp.concatenate([mask, jnp.ones((mask.shape[0], codes.shape[1] - 1), bool)], axis=1)
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        features = None if neighbors is None else self.retrieved_features(neighbors)
        hidden, gates = self.language_model.forward(x, positions, filled, self.grid, features, conditional, rngs)
        return self.gen_head(hidden[:, -codes.shape[1] :]).astype(jnp.float32), gates

    def score(
        self,
        prompt_ids: ArrayLike,
        codes: ArrayLike,
        neighbor_codes: ArrayLike = None,
        prompt_mask: ArrayLike = None,
        grid: ArrayLike = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits [B, T, V] of given codes; row t predicts ``codes[:, t]``.

        Args:
          prompt_ids: int [B, L], BOS … image-start; codes: int [B, T].
          neighbor_codes: int [B, T, K], retrieved codes for FAiD's blenders, any K: they take the mean over all K
            slots, empty ones (-1) too; None = a FAiD model scores as its base does.
          prompt_mask: 0/1 [B, L], 1 = a real token, pads on either side; None = no pads.
          grid: height and width of the T cells, which only blenders look at; None = the model's own where T fits it,
            else a square.

        Raises:
          UserError: if a shape or an id does not fit the model.
        """
        require_own_process()
        prompt_ids, prompt_mask = self.check_prompt(prompt_ids, prompt_mask)
        codes = np.asarray(codes)
        if codes.ndim != 2 or len(codes) != len(prompt_ids):
            raise UserError(f"codes must be [B, T] with B = {len(prompt_ids)} as the prompts, got {codes.shape}")
        _check_ids("codes", codes, self.codebook_size)
        if neighbor_codes is not None:
            neighbor_codes = self._check_neighbors(neighbor_codes, codes.shape)
        model = self
        if grid is not None or neighbor_codes is not None:
            model = self.with_grid(self._grid_of(codes.shape[1], grid))
        codes = jnp.asarray(codes, jnp.int32)
        return _teacher_forced(*nnx.split(model), prompt_ids, prompt_mask, codes, neighbor_codes)

    def _grid_of(self, cells: int, grid: ArrayLike) -> tuple[int, int]:
        """The grid that this many cells fill."""
        side = math.isqrt(cells)
        if grid is None:
            grid = self.grid if math.prod(self.grid) == cells else (side, side)
        grid = self.config.with_grid(grid).grid
        if math.prod(grid) != cells:
            raise UserError(f"{cells} codes do not fill a grid of {grid[0]} x {grid[1]}; say theirs: grid=(H, W)")
        return grid

    def _check_neighbors(self, given: ArrayLike, shape: tuple[int, int]) -> Int[Array, "B T K"]:
        given = np.asarray(given)
        if self.config.faid is None:
            raise UserError("neighbor_codes are given, but this checkpoint has no FAiD blenders")
        if given.ndim != 3 or given.shape[:2] != shape or given.shape[2] < 1:
            raise UserError(f"neighbor_codes must be [B, T, K] with K >= 1 for codes {shape}, got {given.shape}")
        _check_ids("neighbor_codes", given, self.codebook_size, lowest=-1)
        return jnp.asarray(given, jnp.int32)

    def encode_images(self, images: ArrayLike) -> tuple[Int[Array, "B T"], Float[Array, "B H W C"]]:
        """Codes in raster order, and l2-normalised latents before quantisation.

        Args:
          images: float [B, h, w, 3], pixels in [-1, 1]; any height and width that the tokenizer's downsampling divides.

        Raises:
          UserError: if it does not divide them, they are integers, or hold NaN or values outside [-1, 1].
        """
        require_own_process()
        images = images if isinstance(images, Array) else np.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"images must be floats in [-1, 1], got {images.dtype}; of 0 … 255 make x / 127.5 - 1")
        images, cell = jnp.asarray(images, jnp.float32), self.config.vision.downsampling
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % cell or images.shape[2] % cell:
            raise UserError(f"images must be [B, h, w, 3] with h and w multiples of {cell}, got {images.shape}")
        _check_pixels(images)
        codes, latents = encode_split(*nnx.split(self.gen_vision_model), images)
        return codes.reshape(len(images), -1), latents

    def decode_codes(self, codes: ArrayLike, height: SupportsIndex, width: SupportsIndex) -> Float[Array, "B h w 3"]:
        """Pixels in [-1, 1] of a grid of height x width codes.

        Raises:
          UserError: if the codes do not fill that grid, or are not of this codebook.
        """
        require_own_process()
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != height * width:
            raise UserError(f"codes must be [B, {height * width}] for a {height} x {width} grid, got {codes.shape}")
        _check_ids("codes", codes, self.codebook_size)
        grid = jnp.asarray(codes.reshape(-1, height, width), jnp.int32)
        return jnp.clip(_decode(*nnx.split(self.gen_vision_model), grid), -1.0, 1.0)

    def unconditional(self, prompt_ids: Int[Array, "B L"], prompt_mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """The prompt of classifier-free guidance: all but the first and the last real token become pads.

        These pads count as tokens and are attended (docs/reference.md "Prompt"), so the mask stays.
        """
        count = jnp.cumsum(prompt_mask, axis=1)
        ends = (count == 1) | (count == count[:, -1:])
        return jnp.where(prompt_mask & ~ends, self.config.pad_id, prompt_ids)

    def check_prompt(
        self, prompt_ids: ArrayLike, prompt_mask: ArrayLike = None
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        """Prompt and mask as device arrays, or a UserError that names what is wrong with them."""
        ids = np.asarray(prompt_ids)
        given = np.ones(ids.shape, bool) if prompt_mask is None else np.asarray(prompt_mask)
        mask = given.astype(bool)
        if ids.ndim != 2 or ids.shape[1] < 2 or mask.shape != ids.shape:
            raise UserError(f"prompts must be [B, L >= 2] with a mask alike, got {ids.shape} and {mask.shape}")
        if (given != mask).any():  # NaN would count as a token, too
            raise UserError("prompt_mask must hold 0 and 1 alone, 1 where a real token stands")
        if (mask.sum(1) < 2).any():
            raise UserError("a prompt is empty: it needs at least its first and its image-start token")
        _check_ids("prompt_ids", ids, self.config.language.vocab_size)
        return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def left_pad(ids: Int[Array, "R L"], mask: Bool[Array, "R L"]) -> tuple[Int[Array, "R L"], Bool[Array, "R L"]]:
    """Moves pads, wherever they are, to the left; real tokens keep their order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, 1), jnp.take_along_axis(mask, order, 1)


def _check_ids(name: str, ids: np.ndarray, size: int, lowest: int = 0) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < lowest or ids.max() >= size):
        raise UserError(f"{name} must lie in [{lowest}, {size}), got {ids.min()} … {ids.max()}")


def _check_pixels(images: Array) -> None:
    """Raises UserError unless pixels lie in [-1, 1], but for rounding (of tracers nothing is known)."""
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    low, high = float(images.min()), float(images.max())
    if math.isnan(low) or math.isnan(high):
        raise UserError("images hold NaN; pixels must be numbers in [-1, 1]")
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise UserError(
            f"images must be floats in [-1, 1], got {low:g} … {high:g}; of 0 … 255 make x / 127.5 - 1, of 0 … 1 2 x - 1"
        )


# Jitted once a shape; the model travels as (graphdef, state), its arrays as arguments.


@jax.jit(static_argnums=0)
def _teacher_forced(graph, state, prompt_ids, prompt_mask, codes, neighbors):
    return nnx.merge(graph, state).teacher_forced(prompt_ids, prompt_mask, codes, neighbors)


@jax.jit(static_argnums=0)
def encode_split(graph, state, images):
    """Codes [B, H, W] and latents [B, H, W, C] of pixels in [-1, 1] by a tokenizer that ``nnx.split`` took apart."""
    return nnx.merge(graph, state).encode(images)


@jax.jit(static_argnums=0)
def _decode(graph, state, codes):
    return nnx.merge(graph, state).decode_codes(codes)
