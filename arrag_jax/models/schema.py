"""Schemas of the JSON files in a checkpoint folder: the keys that are read, their types and their ranges.

A field has the name of its key. Other keys are ignored, because published files hold many more.
"""

import dataclasses
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.ops.grid import MOST_SIDE
from arrag_jax.parsing import in_range

MOST_LAYERS = 10_000
MOST_WIDTH = 2**20  # of a hidden state, or channels of a convolution
MOST_TOKENS = 2**31 - 1  # ids and positions are int32


def _sizes(section: Any, high: int, *names: str, low: int = 1) -> None:
    """Raises UserError if a field that is given lies outside [low, high]."""
    for name in names:
        value = getattr(section, name)
        if value is not None:
            in_range(name, value, low, high)


def _tokenizer(section: Any, sizes: tuple[str, ...], multipliers: tuple[int, ...]) -> None:
    """Raises UserError if a tokenizer's sizes, number of blocks or multipliers are out of range."""
    _sizes(section, MOST_WIDTH, *sizes)
    _sizes(section, MOST_LAYERS, "num_res_blocks")
    in_range("the number of multipliers of channels", len(multipliers), 1, 16)
    for multiplier in multipliers:
        in_range("a multiplier of channels", multiplier, 1, 2**10)


@dataclasses.dataclass(frozen=True)
class Rope:
    """``rope_parameters`` or ``rope_scaling``, in which newer libraries keep the rotary parameters."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None

    @property
    def kind(self) -> str:
        """The name of the rule that scales the positions; "default" = no scaling."""
        return self.rope_type or self.type or "default"


@dataclasses.dataclass(frozen=True)
class TextSection:
    """The section of the language model, which also holds the keys of FAiD.

    Both layouts omit keys that have the default of transformers' LlamaConfig, so our defaults are the same. The config
    of Janus-Pro-7B gives little more than the number of layers.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    pad_token_id: int | None = None
    max_position_embeddings: int | None = None
    num_SmoothPatchBlender: int | None = None
    num_hop: int | tuple[int, ...] | None = None
    retrieved_key_num: int | None = None

    def __post_init__(self):
        _sizes(self, 2**24, "vocab_size", low=0)
        _sizes(self, MOST_WIDTH, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        _sizes(self, MOST_WIDTH, "head_dim", "retrieved_key_num")
        _sizes(self, MOST_LAYERS, "num_hidden_layers", "num_SmoothPatchBlender")
        _sizes(self, MOST_TOKENS, "max_position_embeddings")
        _sizes(self, MOST_TOKENS, "pad_token_id", low=-1)
        in_range("rms_norm_eps", self.rms_norm_eps, 0, 1)
        for theta in (self.rope_theta, self.rope.rope_theta):
            in_range("rope_theta", 1 if theta is None else theta, 1e-6, 1e12)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % kv_heads:
            raise UserError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise UserError(f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={heads}")
        if (self.head_dim or self.hidden_size // heads) % 2:
            raise UserError(
                f"head_dim={self.head_dim or self.hidden_size // heads} is odd; rotary positions need halves"
            )

    @property
    def rope(self) -> Rope:
        """The rotary parameters, from whichever section holds them."""
        return self.rope_parameters or self.rope_scaling or Rope()


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Side of the images of the image-understanding tower and, in transformers' layout, of its patches, in pixels."""

    image_size: int | None = None
    patch_size: int = 16

    def __post_init__(self):
        _sizes(self, 2**16, "image_size", low=0)
        _sizes(self, 2**16, "patch_size")


@dataclasses.dataclass(frozen=True)
class TowerSection:
    """``vision_config`` of the published layout."""

    params: ImageSize | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerParams:
    """The VQ tokenizer in the published layout, with additional keys of ours; the defaults are VQ-16."""

    image_token_size: int = 16384
    n_embed: int = 8
    ch: int = 128
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = ()  # empty = the same as the encoder's
    z_channels: int = 256
    num_res_blocks: int = 2
    norm_scope: str = "image"
    encoder_kernel: int = 3
    middle: bool = True

    def __post_init__(self):
        _tokenizer(self, ("image_token_size", "n_embed", "ch", "z_channels"), self.encoder_ch_mult)
        for multiplier in self.decoder_ch_mult:
            in_range("a number of decoder_ch_mult", multiplier, 1, 2**10)
        in_range("encoder_kernel", self.encoder_kernel, 1, 31)


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """``gen_vision_config``."""

    params: TokenizerParams = TokenizerParams()


@dataclasses.dataclass(frozen=True)
class AlignerParams:
    """The layers that map image codes to inputs of the language model."""

    projector_type: str = "mlp_gelu"
    depth: int = 2

    def __post_init__(self):
        _sizes(self, MOST_LAYERS, "depth")


@dataclasses.dataclass(frozen=True)
class AlignerSection:
    """``gen_aligner_config``."""

    params: AlignerParams = AlignerParams()


@dataclasses.dataclass(frozen=True)
class HeadParams:
    """The layers that map hidden states to image codes, and their inner width; None = the language model's width."""

    image_token_embed: int | None = None

    def __post_init__(self):
        _sizes(self, MOST_WIDTH, "image_token_embed")


@dataclasses.dataclass(frozen=True)
class HeadSection:
    """``gen_head_config``."""

    params: HeadParams = HeadParams()


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """``config.json`` of Janus-Pro, of FAiD and of our own checkpoints."""

    gen_vision_config: TokenizerSection
    language_config: TextSection | None = None  # None = the folder holds an image tokenizer alone
    gen_head_config: HeadSection = HeadSection()
    gen_aligner_config: AlignerSection = AlignerSection()
    vision_config: TowerSection | None = None
    image_grid: tuple[int, int] | None = None

    def __post_init__(self):
        for side in self.image_grid or ():
            in_range("a side of image_grid", side, 1, MOST_SIDE)


@dataclasses.dataclass(frozen=True)
class VQSection:
    """``vq_config`` of transformers' layout."""

    num_embeddings: int = 16384
    embed_dim: int = 8
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    latent_channels: int = 256
    num_res_blocks: int = 2
    num_hidden_layers: int = 2
    projection_dim: int = 2048
    hidden_act: str = "gelu"

    def __post_init__(self):
        sizes = ("num_embeddings", "embed_dim", "base_channels", "latent_channels", "projection_dim")
        _tokenizer(self, sizes, self.channel_multiplier)
        _sizes(self, MOST_LAYERS, "num_hidden_layers")


@dataclasses.dataclass(frozen=True)
class TransformersConfig:
    """``config.json`` of transformers' Janus."""

    vq_config: VQSection
    text_config: TextSection | None = None
    vision_config: ImageSize | None = None


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """``generation_config.json``."""

    pad_token_id: int | None = None

    def __post_init__(self):
        _sizes(self, MOST_TOKENS, "pad_token_id", low=-1)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """An entry of ``added_tokens`` in ``tokenizer.json``: a token outside the model's vocabulary."""

    content: str = ""
    id: int | None = None

    def __post_init__(self):
        _sizes(self, MOST_TOKENS, "id", low=0)


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """The part of ``tokenizer.json`` that we read ourselves, in addition to the ``tokenizers`` library."""

    added_tokens: tuple[AddedToken, ...] = ()


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """``adapter_config.json`` of the PEFT library; an adapter that sets one of the last four keys is not supported."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: Any = None
    use_dora: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None

    def __post_init__(self):
        _sizes(self, MOST_WIDTH, "r")


@dataclasses.dataclass(frozen=True)
class WeightsIndex:
    """``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]

    def __post_init__(self):
        for name in set(self.weight_map.values()):
            if "/" in name or "\\" in name or not name.isprintable() or not name.endswith((".safetensors", ".bin")):
                raise UserError(f"weight_map names {name[:120]!r}, not the name of a file of weights beside it")
