"""Janus: a Llama decoder that reads text tokens and writes image codes.

Source: docs/reference.md "Backbone". ``gen_embed`` and ``gen_aligner`` embed image codes; ``gen_head`` gives the logits
of codes. Padding never changes a result, because positions count real tokens only and no token attends to a pad (the
reference counts pads; docs/reference.md quirk 17).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.llama_backbone import LlamaBackbone
from arrag_jax.models.presets import JanusConfig
from arrag_jax.models.vq_images import check_ids
from arrag_jax.nn.cache import Cache
from arrag_jax.nn.linear import Linear, embedding
from arrag_jax.nn.transformer import Llama
from arrag_jax.nn.vq import VQTokenizer

Prompts = tuple[Int[Array, "B L"], Bool[Array, "B L"]]  # Janus' condition: token ids, and True where a token is real

PARTS = ("language_model", "gen_vision_model", "gen_embed", "gen_aligner", "gen_head")
VISION = ("gen_vision_model",)  # the image tokenizer alone


class Projector(nnx.Module):
    """Linear layers with exact GELU between them; the aligner and the head are such modules."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([Linear(a, b, rngs) for a, b in pairs])

    def __call__(self, x: Float[Array, "*dims I"]) -> Float[Array, "*dims O"]:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else jax.nn.gelu(x, approximate=False))
        return x


class Janus(LlamaBackbone):
    """The backbone (``interfaces.BlendingBackbone``) with its VQ tokenizer (``interfaces.ImageTokenizer``)."""

    gen_vision_model: VQTokenizer
    gen_embed: nnx.Embed
    gen_aligner: Projector

    def __init__(self, config: JanusConfig, rngs: nnx.Rngs, parts: tuple[str, ...] = PARTS):
        """Builds the named parts; the others are None, such as the language model of an image tokenizer alone."""
        vision = config.vision
        self.config = config
        makers = {
            "language_model": lambda: Llama(config.decoder, rngs, config.faid),
            "gen_vision_model": lambda: VQTokenizer(vision, rngs),
            "gen_embed": lambda: embedding(vision.codebook_size, vision.code_dim, rngs),
            "gen_aligner": lambda: Projector((vision.code_dim, *[config.decoder.width] * config.aligner_depth), rngs),
            "gen_head": lambda: Projector((config.decoder.width, config.head_width, vision.codebook_size), rngs),
        }
        for name, make in makers.items():
            setattr(self, name, nnx.data(make()) if name in parts else None)

    @property
    def codebook_size(self) -> int:
        """V, the number of codes."""
        return self.config.vision.codebook_size

    @property
    def vq(self) -> VQTokenizer:
        """The module of the image tokenizer."""
        return self.gen_vision_model

    def part_names(self) -> tuple[str, ...]:
        """Returns the names of the attributes that hold the parts of the model."""
        return PARTS

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Returns the embeddings of image codes, which are the input of the language model."""
        return self.gen_aligner(self.gen_embed(codes))

    def prefill(self, condition: Prompts, blended_rows: int = 0) -> tuple[Float[Array, "B D"], Cache]:
        """Returns the embeddings of the prompts' last tokens, which are the input of position 0, and the filled cache.

        The cache holds the tokens of the prompts before the last one.
        """
        ids, mask = left_pad(*condition)
        x = self.language_model.embed_tokens(ids)
        cells = self.grid[0] * self.grid[1]
        return x[:, -1], self.language_model.prefill(x[:, :-1], mask[:, :-1], cells, blended_rows)

    def forward_states(
        self,
        condition: Prompts,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, " blenders"]]:
        """Returns the states of all positions and each blender's mean gate.

        Args:
          condition: token ids and mask.
          codes: state t predicts ``codes[:, t]``.
          neighbors: retrieved codes, -1 where absent; None = no blending.
          conditional: True for rows that have their caption; blenders do nothing in the other rows.
          rngs: for dropout; None = no dropout.
        """
        ids, mask = left_pad(*condition)
        filled = jnp.concatenate([mask, jnp.ones((mask.shape[0], codes.shape[1] - 1), bool)], axis=1)
        positions = jnp.maximum(jnp.cumsum(filled, axis=1) - 1, 0).astype(jnp.int32)
        prompts = self.language_model.embed_tokens(ids)
        return self.continued(prompts, codes, positions, filled, neighbors, conditional, rngs)

    def unconditional(self, condition: Prompts) -> Prompts:
        """Returns the unconditional prompts of classifier-free guidance.

        Every real token except the first and the last becomes a pad. These pads count as tokens and are attended to
        (docs/reference.md "Prompt"), so the mask does not change.
        """
        ids, mask = condition
        count = jnp.cumsum(mask, axis=1)
        ends = (count == 1) | (count == count[:, -1:])
        return jnp.where(mask & ~ends, self.config.pad_id, ids), mask

    def condition_shapes(self, batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Returns the shapes of the condition of ``batch`` prompts of ``length`` tokens."""
        return jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch, length), bool)

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Prompts:
        """Returns prompt ids and mask as device arrays.

        Args:
          condition: ids [B, L], or the pair (ids, mask).
          mask: for ids without a mask; None = all ids are real tokens.

        Raises:
          UserError: if ids or mask do not fit the model; the message says what is wrong.
        """
        if mask is None and isinstance(condition, tuple) and len(condition) == 2 and np.ndim(condition[0]) == 2:
            condition, mask = condition
        ids = np.asarray(condition)
        given = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
        mask = given.astype(bool)
        if ids.ndim != 2 or ids.shape[1] < 2 or mask.shape != ids.shape:
            raise UserError(f"prompts must be [B, L >= 2] with a mask alike, got {ids.shape} and {mask.shape}")
        if (given != mask).any():  # bool(NaN) is True
            raise UserError("prompt_mask must hold 0 and 1 alone, 1 where a real token stands")
        if (mask.sum(1) < 2).any():
            raise UserError("a prompt is empty: it needs at least its first and its image-start token")
        check_ids("prompt_ids", ids, self.config.language.vocab_size)
        return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def left_pad(ids: Int[Array, "R L"], mask: Bool[Array, "R L"]) -> tuple[Int[Array, "R L"], Bool[Array, "R L"]]:
    """Returns ids and mask with all pads moved to the left; real tokens keep their order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(ids, order, 1), jnp.take_along_axis(mask, order, 1)
