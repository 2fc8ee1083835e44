"""Janus: a Llama decoder that reads text tokens and writes image codes.

Source: reference README "Backbone". Image codes enter through ``gen_embed`` and ``gen_aligner``,
image logits leave through ``gen_head``. Padding never changes a result: positions count real tokens
only, and pads are never attended (the reference counts them; quirk 17).
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.presets import JanusConfig
from arrag_jax.models.vq_images import VQImages, check_ids
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.linear import Linear, embedding
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.transformer import Cache, Llama
from arrag_jax.nn.vq import VQTokenizer

Prompts = tuple[Int[Array, "B L"], Bool[Array, "B L"]]  # Janus' condition: token ids, and True where a token is real

PARTS = ("language_model", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head")
VISION = ("gen_vision_model",)  # the tokenizer alone


class Projector(nnx.Module):
    """Linear layers with exact GELU between them: the aligner, and the head."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([Linear(a, b, rngs) for a, b in pairs])

    def __call__(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims O"]:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else jax.nn.gelu(x, approximate=False))
        return x


class Janus(VQImages):
    """The backbone (``interfaces.BlendingBackbone``) together with its VQ tokenizer (``interfaces.ImageTokenizer``)."""

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
        return self.config.blended_neighbors

    @property
    def vq(self) -> VQTokenizer:
        """The tokenizer's module."""
        return self.gen_vision_model

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

    def add_adapters(
        self, lora: LoraConfig, faid: FaidConfig | None, rngs: nnx.Rngs, start_silent: bool = False, devices: int = 1
    ) -> None:
        """Gives the language model a fresh LoRA, and fresh blenders unless it has them, in place.

        Args:
          faid: None adds no blenders.
          start_silent: fresh blenders start by adding nothing.
          devices: over how many a training batch is spread.

        Raises:
          UserError: it has other blenders already.
        """
        if faid is not None and self.config.faid is None:
            self.config = dataclasses.replace(self.config, faid=faid)
            self.language_model.add_blenders(faid, rngs, start_silent)
        elif faid is not None and self.config.faid != faid:
            raise UserError(f"the model has blenders already, {self.config.faid}, which are not the config's {faid}")
        for layer in self.language_model.layers:
            layer.attention.add_lora(lora, rngs)
            if layer.blender is not None:
                layer.blender.devices = devices

    def adapters(self, blenders: bool = True) -> list[nnx.Module]:
        """The modules that fine-tuning trains: the head, every LoRA and, unless told otherwise, every blender."""
        parts = [self.gen_head]
        for layer in self.language_model.layers:
            parts += [layer.attention.q_lora, layer.attention.v_lora, layer.blender if blenders else None]
        return [part for part in parts if part is not None]

    def merge_lora(self) -> None:
        """Adds every LoRA to the weights that it corrects, in place."""
        for layer in self.language_model.layers:
            layer.attention.merge_lora()

    def prefill(self, condition: Prompts, blended_rows: int = 0) -> tuple[Float[Array, "B D"], Cache]:
        """Reads the prompts but for their last tokens, whose embeddings are the input of cell 0."""
        ids, mask = left_pad(*condition)
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
        condition: Prompts,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of all cells at once; row t predicts ``codes[:, t]``.

        Args:
          neighbors: retrieved codes, -1 where absent; None = FAiD's blenders, if any, are passed over.
        """
        return self.forward(condition, codes, neighbors)[0]

    def forward(
        self,
        condition: Prompts,
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
        ids, mask = left_pad(*condition)
        x = jnp.concatenate([self.language_model.embed_tokens(ids), self.embed_codes(codes[:, :-1])], axis=1)
        filled = jnp.concatenate([mask, jnp.ones((mask.shape[0], codes.shape[1] - 1), bool)], axis=1)
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        features = None if neighbors is None else self.retrieved_features(neighbors)
        hidden, gates = self.language_model.forward(x, positions, filled, self.grid, features, conditional, rngs)
        return self.gen_head(hidden[:, -codes.shape[1] :]).astype(jnp.float32), gates

    def score(
        self,
        condition: ArrayLike,
        codes: ArrayLike,
        neighbor_codes: ArrayLike = None,
        prompt_mask: ArrayLike = None,
        grid: ArrayLike = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits [B, T, V] of given codes; row t predicts ``codes[:, t]``.

        Args:
          condition: prompt ids int [B, L], BOS … image-start, or (ids, mask); codes: int [B, T].
          neighbor_codes: int [B, T, K], retrieved codes for FAiD's blenders, any K: they take the mean over all K
            slots, empty ones (-1) too; None = a FAiD model scores as its base does.
          prompt_mask: 0/1 [B, L], 1 = a real token, pads on either side; None = no pads.
          grid: height and width of the T cells, which only blenders look at; None = the model's own where T fits it,
            else a square.

        Raises:
          UserError: if a shape or an id does not fit the model.
        """
        require_own_process()
        condition = self.check_condition(condition, prompt_mask)
        codes, batch = np.asarray(codes), len(condition[0])
        if codes.ndim != 2 or len(codes) != batch:
            raise UserError(f"codes must be [B, T] with B = {batch} as the prompts, got {codes.shape}")
        check_ids("codes", codes, self.codebook_size)
        if neighbor_codes is not None:
            neighbor_codes = self._check_neighbors(neighbor_codes, codes.shape)
        model = self
        if grid is not None or neighbor_codes is not None:
            model = self.with_grid(self._grid_of(codes.shape[1], grid))
        codes = jnp.asarray(codes, jnp.int32)
        return _teacher_forced(*nnx.split(model), condition, codes, neighbor_codes)

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
        check_ids("neighbor_codes", given, self.codebook_size, lowest=-1)
        return jnp.asarray(given, jnp.int32)

    def unconditional(self, condition: Prompts) -> Prompts:
        """The prompts of classifier-free guidance: all but the first and the last real token become pads.

        These pads count as tokens and are attended (reference README, "Prompt"), so the mask stays.
        """
        ids, mask = condition
        count = jnp.cumsum(mask, axis=1)
        ends = (count == 1) | (count == count[:, -1:])
        return jnp.where(mask & ~ends, self.config.pad_id, ids), mask

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Prompts:
        """Prompt ids and mask as device arrays, or a UserError that names what is wrong with them.

        Args:
          condition: ids [B, L], or the pair (ids, mask).
          mask: of ids alone; None = all are real tokens.
        """
        if mask is None and isinstance(condition, tuple) and len(condition) == 2 and np.ndim(condition[0]) == 2:
            condition, mask = condition
        ids = np.asarray(condition)
        given = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
        mask = given.astype(bool)
        if ids.ndim != 2 or ids.shape[1] < 2 or mask.shape != ids.shape:
            raise UserError(f"prompts must be [B, L >= 2] with a mask alike, got {ids.shape} and {mask.shape}")
        if (given != mask).any():  # NaN would count as a token, too
            raise UserError("prompt_mask must hold 0 and 1 alone, 1 where a real token stands")
        if (mask.sum(1) < 2).any():
            raise UserError("a prompt is empty: it needs at least its first and its image-start token")
        check_ids("prompt_ids", ids, self.config.language.vocab_size)
        return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def left_pad(ids: Int[Array, "R L"], mask: Bool[Array, "R L"]) -> tuple[Int[Array, "R L"], Bool[Array, "R L"]]:
    """Moves pads, wherever they are, to the left; real tokens keep their order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, 1), jnp.take_along_axis(mask, order, 1)


# Jitted once a shape; the model travels as (graphdef, state), its arrays as arguments.
@jax.jit(static_argnums=0)
def _teacher_forced(graph, state, condition, codes, neighbors):
    return nnx.merge(graph, state).teacher_forced(condition, codes, neighbors)
