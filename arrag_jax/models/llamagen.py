"""LlamaGen: a Llama decoder that reads a class or text features and writes image codes.

Source: Sun et al. 2024, "Autoregressive Model Beats Diffusion", and its official code. Image codes have their own
embeddings and two-dimensional rotary positions on the grid. The condition before them (one class or T text features)
has no rotary positions (``nn.rotary``). A condition is int [B] (classes), or the pair float [B, T, C] (features) and
bool [B, T] (True = a real feature).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike, Cache
from arrag_jax.models.llama_backbone import LlamaBackbone
from arrag_jax.models.llamagen_config import LlamaGenConfig
from arrag_jax.models.vq_images import check_ids
from arrag_jax.nn.linear import Linear, embedding
from arrag_jax.nn.transformer import Llama
from arrag_jax.nn.variables import Frozen
from arrag_jax.nn.vq import VQTokenizer

Classes = Int[Array, " B"]
Features = tuple[Float[Array, "B L C"], Bool[Array, "B L"]]

PARTS = ("language_model", "gen_vision_model", "cls_embedding", "gen_head")
VISION = ("gen_vision_model",)  # the image tokenizer alone


class ClassEmbedding(nnx.Module):
    """One vector per class; the row after the last class stands for "no class"."""

    def __init__(self, config: LlamaGenConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        rows = config.classes + config.guided
        self.embedding_table = embedding(rows, config.decoder.width, rngs, init)

    def __call__(self, labels: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
        return self.embedding_table(labels)[:, None]


class CaptionEmbedding(nnx.Module):
    """Two linear layers over text features, and the fixed (untrained) features that stand for "no caption"."""

    def __init__(self, config: LlamaGenConfig, rngs: nnx.Rngs):
        init, width = nnx.initializers.normal(0.02), config.decoder.width
        self.fc1 = Linear(config.caption_width, width, rngs, bias=False, init=init)
        self.fc2 = Linear(width, width, rngs, bias=False, init=init)
        shape = (config.caption_tokens, config.caption_width)
        self.uncond_embedding = Frozen(jax.random.normal(rngs.params(), shape) * config.caption_width**-0.5)

    def __call__(self, features: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        hidden = self.fc1(features.astype(self.fc1.weight.dtype))
        return self.fc2(jax.nn.gelu(hidden, approximate=True))


class LlamaGen(LlamaBackbone):
    """The backbone (``interfaces.BlendingBackbone``) with, if it has one, its image tokenizer (``ImageTokenizer``)."""

    gen_vision_model: VQTokenizer
    cls_embedding: Any  # a ClassEmbedding or a CaptionEmbedding

    def __init__(self, config: LlamaGenConfig, rngs: nnx.Rngs, parts: tuple[str, ...] = PARTS):
        """Builds the named parts; the others are None. Without a tokenizer the model works on codes alone."""
        self.config = config
        condition = ClassEmbedding if config.family == "c2i" else CaptionEmbedding
        makers = {
            "language_model": lambda: Llama(config.decoder, rngs, config.faid),
            "gen_vision_model": lambda: VQTokenizer(config.vision, rngs),
            "cls_embedding": lambda: condition(config, rngs),
            "gen_head": lambda: Linear(
                config.decoder.width, config.decoder.vocab_size, rngs, False, nnx.initializers.zeros
            ),
        }
        for name, make in makers.items():
            setattr(self, name, nnx.data(make()) if name in parts else None)

    @property
    def codebook_size(self) -> int:
        """V, the number of codes."""
        return self.config.language.vocab_size if self.config.language else self.config.vision.codebook_size

    @property
    def vq(self) -> VQTokenizer:
        """The module of the image tokenizer.

        Raises:
          UserError: if the model was read without a tokenizer.
        """
        if self.gen_vision_model is None:
            raise UserError(
                "this LlamaGen has no image tokenizer: put its weights beside the model's, as vq.safetensors or vq*.pt "
                "(vq_ds16_c2i.pt of a c2i model, vq_ds16_t2i.pt of a t2i one)"
            )
        return self.gen_vision_model

    def part_names(self) -> tuple[str, ...]:
        """Returns the names of the attributes that hold the parts of the model."""
        return PARTS

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        """Returns the embeddings of image codes, which are the input of the language model."""
        return self.language_model.embed_tokens(codes)

    def prefill(self, condition: Classes | Features, blended_rows: int = 0) -> tuple[Float[Array, "R D"], Cache]:
        """Returns the embedding of the condition's last token, which is the input of position 0, and the filled cache.

        The cache holds the tokens of the condition before the last one.
        """
        x, mask = self._embedded(condition)
        cells = self.grid[0] * self.grid[1]
        cache = self.language_model.prefill(x[:, :-1], mask[:, :-1], cells, blended_rows)
        # The last token may be a pad. A pad attends to itself, and no later token attends to it.
        return x[:, -1], cache._replace(filled=cache.filled.at[:, x.shape[1] - 1].set(mask[:, -1]))

    def forward_states(
        self,
        condition: Classes | Features,
        codes: Int[Array, "B T"],
        neighbors: Int[Array, "B T K"] | None = None,
        conditional: Bool[Array, " B"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, " blenders"]]:
        """Returns the states of all positions and each blender's mean gate.

        Args:
          condition: classes, or features and mask.
          codes: state t predicts ``codes[:, t]``.
          neighbors: retrieved codes, -1 where absent; None = no blending.
          conditional: True for rows that have their caption; blenders do nothing in the other rows.
          rngs: for dropout; None = no dropout.
        """
        x, mask = self._embedded(condition)
        batch, drawn = codes.shape[0], codes.shape[1] - 1
        filled = jnp.concatenate([mask, jnp.ones((batch, drawn), bool)], axis=1)
        positions = jnp.concatenate([jnp.full(x.shape[1], -1), jnp.arange(drawn)]).astype(jnp.int32)
        positions = jnp.broadcast_to(positions[None], filled.shape)
        return self.continued(x, codes, positions, filled, neighbors, conditional, rngs)

    def _embedded(self, condition: Classes | Features) -> tuple[Float[Array, "B L D"], Bool[Array, "B L"]]:
        """Returns the embedded tokens of a condition, and which of them may be attended to."""
        if self.config.family == "c2i":
            return self.cls_embedding(condition), jnp.ones((len(condition), 1), bool)
        features, mask = condition
        return self.cls_embedding(features), mask

    def unconditional(self, condition: Classes | Features) -> Classes | Features:
        """Returns the unconditional input of classifier-free guidance: "no class", or "no caption" with the same mask.

        A condition with fewer tokens takes the last features of "no caption", because captions are padded on the left.

        Raises:
          UserError: if the model was trained without an unconditional class.
        """
        if self.config.family == "c2i":
            if not self.config.guided:
                raise UserError(
                    "this LlamaGen has no unconditional class (class_dropout_prob 0); draw with cfg_scale=None"
                )
            assert not isinstance(condition, tuple)
            return jnp.full_like(condition, self.config.classes)
        features, mask = condition
        rows = self.cls_embedding.uncond_embedding[-features.shape[1] :]
        return jnp.broadcast_to(rows[None].astype(features.dtype), features.shape), mask

    def condition_shapes(self, batch: int, length: int) -> Any:
        """Returns the shapes of the condition of ``batch`` images; the length of captions is the model's own."""
        if self.config.family == "c2i":
            return jax.ShapeDtypeStruct((batch,), jnp.int32)
        tokens, width = self.config.caption_tokens, self.config.caption_width
        return jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32), jax.ShapeDtypeStruct((batch, tokens), bool)

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Classes | Features:
        """Returns classes, or features and mask, as device arrays.

        Args:
          condition: for c2i int [B], where the number after the last class means "no class"; for t2i float [B, T, C]
            or the pair (features, mask).
          mask: for features only; None = all features are real.

        Raises:
          UserError: if the condition does not fit the model; the message says what is wrong.
        """
        if self.language_model is None:
            raise UserError("this is an image tokenizer alone, without the language model that draws")
        if self.config.family == "c2i":
            return self._check_classes(condition, mask)
        if mask is None and isinstance(condition, tuple) and len(condition) == 2 and np.ndim(condition[0]) == 3:
            condition, mask = condition
        features, config = np.asarray(condition), self.config
        given = np.ones(features.shape[:2], bool) if mask is None else np.asarray(mask)
        mask = given.astype(bool)
        if features.ndim != 3 or not jnp.issubdtype(features.dtype, jnp.floating):
            raise UserError(f"text features must be floats [B, T, C], got {features.dtype} {features.shape}")
        if features.shape[2] != config.caption_width or not 1 <= features.shape[1] <= config.caption_tokens:
            raise UserError(
                f"text features must be [B, T, {config.caption_width}] with T from 1 to {config.caption_tokens}, got "
                f"{features.shape}"
            )
        if mask.shape != features.shape[:2] or (given != mask).any():
            raise UserError(f"the mask of {features.shape} features must hold 0 and 1 alone, [B, T], got {mask.shape}")
        if not mask.any(1).all():
            raise UserError("a caption is empty: its mask has no 1")
        if not np.isfinite(features.astype(np.float32)).all():
            raise UserError("text features hold NaN or infinite numbers; compute them again")
        return jnp.asarray(features), jnp.asarray(mask)

    def _check_classes(self, condition: ArrayLike, mask: ArrayLike) -> Classes:
        labels = np.asarray(condition)
        if mask is not None:
            raise UserError("classes take no mask; leave prompt_mask away")
        if labels.ndim != 1:
            raise UserError(f"classes must be [B], got {labels.shape}")
        check_ids("classes", labels, self.config.classes + self.config.guided)
        return jnp.asarray(labels, jnp.int32)
