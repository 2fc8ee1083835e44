"""Defines a VQ tokenizer with an L2-normalised codebook: LlamaGen's VQ-16 and smaller variants.

Images are NHWC with pixels in [-1, 1]. ``VQConfig()`` is VQ-16. Source: docs/reference.md "Backbone" and quirk 24.

Three fields make the codes local, so that equal patches get equal codes in every image. ``norm_scope="pixel"`` avoids
GroupNorm, which makes every code depend on every pixel. ``middle=False`` removes attention. ``encoder_kernel=1`` keeps
the receptive field small.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from arrag_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of the tokenizer; the defaults are those of VQ-16."""

    codebook_size: int = 16384
    code_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channel multiplier of each level
    decoder_multipliers: tuple[int, ...] | None = None  # the same for the decoder; None = as the encoder
    z_channels: int = 256
    res_blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more per level
    norm_scope: str = "image"  # "image" = GroupNorm over the image | "pixel" = LayerNorm over the channels of a pixel
    # Kernel size of the encoder's residual blocks and last convolution; with 1 a code depends on few pixels around it.
    encoder_kernel: int = 3
    middle: bool = True  # adds residual, attention and residual blocks, and attention in the level of lowest resolution
    norm_groups: int = 32  # number of groups of a GroupNorm
    norm_eps: float = 1e-6
    unit_codes: bool = True  # codes and latents are L2-normalised before they are compared and decoded

    def __post_init__(self):
        if self.norm_scope not in ("image", "pixel"):
            raise UserError(f"norm_scope={self.norm_scope!r} is unknown; choose image or pixel")
        widths = [self.channels * m for m in (*self.multipliers, *(self.decoder_multipliers or ()))]
        if self.norm_scope == "image" and any(width % self.norm_groups for width in widths):
            raise UserError(f"channels of {widths} are no multiples of {self.norm_groups}, as norm_scope='image' needs")
        if not self.encoder_kernel % 2:
            raise UserError(f"encoder_kernel={self.encoder_kernel} must be odd")
        if self.decoder_multipliers is not None and len(self.decoder_multipliers) != len(self.multipliers):
            raise UserError(
                f"the decoder's levels {self.decoder_multipliers} must be as many as the encoder's {self.multipliers}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per position, in height and in width."""
        return 2 ** (len(self.multipliers) - 1)


def l2_normalize(x: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
    """Returns vectors divided by their norm along the last axis; norms below 1e-12 count as 1e-12."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _conv(inputs: int, outputs: int, kernel: int, rngs: nnx.Rngs, **kwargs) -> nnx.Conv:
    padding = kwargs.pop("padding", kernel // 2)
    return nnx.Conv(inputs, outputs, (kernel, kernel), padding=padding, rngs=rngs, **kwargs)


def _norm(channels: int, config: VQConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm_scope == "pixel":
        return nnx.LayerNorm(channels, epsilon=config.norm_eps, rngs=rngs)
    # The fast variance, E[x²] − E[x]², loses precision by cancellation if the mean is large.
    groups, eps = config.norm_groups, config.norm_eps
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=eps, use_fast_variance=False, rngs=rngs)


class ResBlock(nnx.Module):
    """A residual block: two convolutions with norms, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VQConfig, rngs: nnx.Rngs, kernel: int = 3):
        self.norm1, self.conv1 = _norm(inputs, config, rngs), _conv(inputs, outputs, kernel, rngs)
        self.norm2, self.conv2 = _norm(outputs, config, rngs), _conv(outputs, outputs, kernel, rngs)
        self.nin_shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, rngs)

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h w O"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
    """Self-attention with one head over all positions of the map."""

    def __init__(self, channels: int, config: VQConfig, rngs: nnx.Rngs):
        self.norm = _norm(channels, config, rngs)
        self.q, self.k, self.v, self.proj_out = (_conv(channels, channels, 1, rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        y = self.norm(x)
        flat = (x.shape[0], -1, 1, x.shape[-1])
        q, k, v = (conv(y).reshape(flat) for conv in (self.q, self.k, self.v))
        return x + self.proj_out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Level(nnx.Module):
    """The residual blocks of one resolution, followed by a change of resolution."""

    def __init__(self, inputs: int, outputs: int, config: VQConfig, rngs: nnx.Rngs, **parts):
        blocks, attention = parts["blocks"], parts["attention"]
        self.res = nnx.List(
            [ResBlock(inputs if i == 0 else outputs, outputs, config, rngs, parts["kernel"]) for i in range(blocks)]
        )
        self.attn = nnx.List([AttnBlock(outputs, config, rngs) for _ in range(blocks if attention else 0)])
        # PyTorch's padding is asymmetric: one row and one column of zeros, at the end only.
        far = ((0, 1), (0, 1))
        self.downsample = _conv(outputs, outputs, 3, rngs, strides=2, padding=far) if parts.get("down") else None
        self.upsample = _conv(outputs, outputs, 3, rngs) if parts.get("up") else None

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h2 w2 O"]:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


def _middle(channels: int, config: VQConfig, rngs: nnx.Rngs, kernel: int = 3) -> nnx.List:
    if not config.middle:
        return nnx.List([])
    first, last = (ResBlock(channels, channels, config, rngs, kernel) for _ in range(2))
    return nnx.List([first, AttnBlock(channels, config, rngs), last])


class Encoder(nnx.Module):
    """The encoder: from pixels to a map with ``z_channels`` channels at 1/downsampling of the resolution."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = _conv(3, config.channels, 3, rngs)
        inputs, levels = config.channels, []
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            levels.append(
                Level(
                    inputs, width, config, rngs,
                    blocks=config.res_blocks, attention=last and config.middle, down=not last,
                    kernel=config.encoder_kernel,
                )
            )  # fmt: skip
            inputs = width
        self.conv_blocks = nnx.List(levels)
        self.mid = _middle(inputs, config, rngs, config.encoder_kernel)
        self.norm_out = _norm(inputs, config, rngs)
        self.conv_out = _conv(inputs, config.z_channels, config.encoder_kernel, rngs)

    def __call__(self, x: Float[Array, "B h w 3"]) -> Float[Array, "B H W Z"]:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """The decoder: from a map with ``z_channels`` channels to pixels."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        widths = [config.channels * m for m in reversed(config.decoder_multipliers or config.multipliers)]
        inputs, levels = widths[0], []
        self.conv_in = _conv(config.z_channels, inputs, 3, rngs)
        self.mid = _middle(inputs, config, rngs)
        for i, width in enumerate(widths):
            levels.append(
                Level(
                    inputs, width, config, rngs,
                    blocks=config.res_blocks + 1, attention=i == 0 and config.middle, up=i < len(widths) - 1, kernel=3,
                )
            )  # fmt: skip
            inputs = width
        self.conv_blocks = nnx.List(levels)
        self.norm_out, self.conv_out = _norm(inputs, config, rngs), _conv(inputs, 3, 3, rngs)

    def __call__(self, z: Float[Array, "B H W Z"]) -> Float[Array, "B h w 3"]:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VQTokenizer(nnx.Module):
    """The tokenizer: from images to grids of codes, and back."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = Encoder(config, rngs), Decoder(config, rngs)
        self.quant_conv = _conv(config.z_channels, config.code_dim, 1, rngs)
        self.post_quant_conv = _conv(config.code_dim, config.z_channels, 1, rngs)
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (config.codebook_size, config.code_dim)))

    @property
    def codebook(self) -> Float[Array, "V C"]:
        """Unit vectors of the codes, float32; used for keys, and for decoding if ``unit_codes`` is on."""
        return l2_normalize(self.codes[...].astype(jnp.float32))

    def encode(self, images: Float[Array, "B h w 3"]) -> tuple[Int[Array, "B H W"], Float[Array, "B H W C"]]:
        """Returns the codes, and the L2-normalised latents before quantisation, which the official keys consist of."""
        raw = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        latents = l2_normalize(raw)
        if self.config.unit_codes:  # for unit vectors, the nearest code has the largest inner product
            near = latents @ self.codebook.T
        else:
            codes = self.codes[...].astype(jnp.float32)
            near = raw @ codes.T - jnp.square(codes).sum(-1)[None, None, None] / 2
        return jnp.argmax(near, axis=-1).astype(jnp.int32), latents

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B h w 3"]:
        """Returns the pixels of quantised latents; they are not clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents.astype(self.post_quant_conv.kernel.dtype)))

    def decode_codes(self, codes: Int[Array, "B H W"]) -> Float[Array, "B h w 3"]:
        """Returns the pixels of codes; they are not clipped to [-1, 1]."""
        rows = self.codebook if self.config.unit_codes else self.codes[...].astype(jnp.float32)
        return self.decode(rows[codes])


def from_uint8(images: UInt8[Array | np.ndarray, "*dims"]) -> Float[Array, "*dims"]:
    """Returns uint8 pixels as floats in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "*dims"]) -> UInt8[Array, "*dims"]:
    """Returns pixels in [-1, 1] as uint8: clip((x + 1) / 2 · 255), truncated as in docs/reference.md quirk 25."""
    return jnp.clip((images + 1) / 2 * 255, 0, 255).astype(jnp.uint8)
