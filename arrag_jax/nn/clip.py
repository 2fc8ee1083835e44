"""Defines CLIP: an image tower and a text tower that map to vectors of one space.

The attributes have the names of the published checkpoints, so that a parameter's path is its published key.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.nn.linear import Linear, embedding

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
FIRST_EOS = 2  # an end-of-text id in older configs that means: the largest id of a row


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Shape of one tower; the defaults are those of the image tower of ViT-B/32."""

    width: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"a width of {self.width} is no multiple of {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.activation!r} is not supported; choose {' or '.join(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of both towers; the defaults are those of ViT-B/32."""

    vision: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig(width=512, mlp=2048, heads=8)
    dim: int = 512  # of the common space
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    length: int = 77  # tokens of a text
    eos_id: int = 49407

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.width, config.width, rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B S D"], causal: bool) -> Float[Array, "B S D"]:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers with the tower's activation between them."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.fc1, self.fc2 = Linear(config.width, config.mlp, rngs), Linear(config.mlp, config.width, rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Attention and MLP, each with a norm before it."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        self.layer_norm1, self.layer_norm2 = _norm(config, rngs), _norm(config, rngs)
        self.self_attn, self.mlp = Attention(config, rngs), Mlp(config, rngs)

    def __call__(self, x: Float[Array, "B S D"], causal: bool) -> Float[Array, "B S D"]:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers of a tower."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])

    def __call__(self, x: Float[Array, "B S D"], causal: bool = False) -> Float[Array, "B S D"]:
        for layer in self.layers:
            x = layer(x, causal)
        return x


class VisionEmbeddings(nnx.Module):
    """From pixels to one vector per patch, after that of the class token, with positions."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        width, side = config.vision.width, config.patch_size
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.patch_embedding = nnx.Conv(
            3, width, (side, side), strides=side, padding="VALID", use_bias=False, rngs=rngs
        )
        self.position_embedding = embedding(config.patches + 1, width, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B S D"]:
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(pixels), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].reshape(1, 1, -1), (len(pixels), 1, patches.shape[-1]))
        return jnp.concatenate([first.astype(patches.dtype), patches], 1) + self.position_embedding.embedding[...][None]


class VisionTower(nnx.Module):
    """The image tower before its projection; its result is the class token's state."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs)
        self.pre_layrnorm = _norm(config.vision, rngs)  # the published name
        self.encoder = Encoder(config.vision, rngs)
        self.post_layernorm = _norm(config.vision, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B D"]:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class TextEmbeddings(nnx.Module):
    """From tokens to vectors, with positions."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.token_embedding = embedding(config.vocab_size, config.text.width, rngs)
        self.position_embedding = embedding(config.length, config.text.width, rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.token_embedding(ids) + self.position_embedding.embedding[: ids.shape[1]][None]


class TextTower(nnx.Module):
    """The text tower before its projection; its result is the state at the end-of-text token.

    A token sees only those before it, so that what pads a row does not matter.
    """

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.eos_id = config.eos_id
        self.embeddings = TextEmbeddings(config, rngs)
        self.encoder = Encoder(config.text, rngs)
        self.final_layer_norm = _norm(config.text, rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B D"]:
        states = self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))
        ends = ids if self.eos_id == FIRST_EOS else (ids == self.eos_id).astype(jnp.int32)
        return states[jnp.arange(len(ids)), jnp.argmax(ends, 1)]


class Clip(nnx.Module):
    """Both towers with their projections."""

    def __init__(self, config: ClipConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_model, self.text_model = VisionTower(config, rngs), TextTower(config, rngs)
        self.visual_projection = Linear(config.vision.width, config.dim, rngs, bias=False)
        self.text_projection = Linear(config.text.width, config.dim, rngs, bias=False)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592))

    def image_features(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
        """Returns the vectors of images that ``models.clip.clip_pixels`` prepared, before normalisation."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Int[Array, "B L"]) -> Float[Array, "B C"]:
        """Returns the vectors of tokenized texts, each of which holds an end-of-text token, before normalisation."""
        return self.text_projection(self.text_model(ids))


def _norm(config: TowerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)
