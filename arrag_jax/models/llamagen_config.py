"""``config.json`` of a LlamaGen: its schema, the model shape that it describes, and the published sizes.

Published checkpoints have no config. Ours has ``"model_type": "llamagen"``, a ``family``, and the hyper-parameters
under their official names. A key that is absent has the default of the official code. The keys of the image tokenizer
are in a section ``vq`` or at the top level. The keys of FAiD are those of the published FAiD.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.models.config_json import read_faid, read_json
from arrag_jax.models.schema import MOST_LAYERS, MOST_WIDTH
from arrag_jax.models.shape import ModelShape
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.ops.grid import MOST_SIDE
from arrag_jax.parsing import in_range, parse, shown

MODEL_TYPE = "llamagen"
FAMILIES = ("c2i", "t2i")  # generates from a class | from a text
NAMED = ("dim", "n_layer", "n_head")  # hyper-parameters without a default


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig(ModelShape):
    """The shape of a LlamaGen.

    Attributes:
      language: the decoder, whose vocabulary is the codebook.
      family: one of ``FAMILIES``.
      classes: number of classes of a c2i model. The class embedding has one more row for "no class" if ``guided``.
      caption_width: width of the text features of a t2i model.
      caption_tokens: number of text features of a t2i model.
      guided: whether there is an unconditional class.
    """

    grid: tuple[int, int] = (16, 16)
    family: str = "c2i"
    classes: int = 1000
    caption_width: int = 2048
    caption_tokens: int = 120
    guided: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerFields:
    """The keys of the VQ tokenizer; the defaults are VQ-16."""

    ch: int = 128
    groupnorm_groups: int = 32
    groupnorm_eps: float = 1e-6
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = ()  # empty = the same as the encoder's
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    num_res_blocks: int = 2
    downsample: int | None = None

    def __post_init__(self):
        for name in ("ch", "groupnorm_groups", "z_channels", "codebook_size", "codebook_embed_dim"):
            in_range(name, getattr(self, name), 1, MOST_WIDTH)
        in_range("num_res_blocks", self.num_res_blocks, 1, MOST_LAYERS)
        in_range("groupnorm_eps", self.groupnorm_eps, 0, 1)
        in_range("the number of encoder_ch_mult", len(self.encoder_ch_mult), 1, 16)
        for multiplier in (*self.encoder_ch_mult, *self.decoder_ch_mult):
            in_range("a multiplier of channels", multiplier, 1, 2**10)
        made = 2 ** (len(self.encoder_ch_mult) - 1)
        if self.downsample not in (None, made):
            raise UserError(f"downsample={self.downsample}, but encoder_ch_mult={self.encoder_ch_mult} makes {made}")


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """The keys of the decoder, its condition and FAiD."""

    family: str
    dim: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    head_dim: int | None = None
    multiple_of: int | None = None
    ffn_dim_multiplier: float | None = None
    ffn_hidden: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = 16384
    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    cls_token_num: int | None = None
    block_size: int | None = None
    grid: int | tuple[int, int] | None = None
    vq: dict[str, Any] | None = None
    num_SmoothPatchBlender: int | None = None
    num_hop: int | tuple[int, ...] | None = None
    retrieved_key_num: int | None = None

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"family={shown(self.family)} is unknown; choose one of {', '.join(FAMILIES)}")
        widths = ("dim", "n_head", "n_kv_head", "head_dim", "multiple_of", "ffn_hidden", "caption_dim")
        for name in (*widths, "retrieved_key_num"):
            in_range(name, _given(getattr(self, name), 1), 1, MOST_WIDTH)
        for name in ("n_layer", "num_SmoothPatchBlender"):
            in_range(name, _given(getattr(self, name), 1), 1, MOST_LAYERS)
        for name in ("vocab_size", "num_classes", "cls_token_num", "block_size"):
            in_range(name, _given(getattr(self, name), 1), 1, 2**24)
        in_range("ffn_dim_multiplier", _given(self.ffn_dim_multiplier, 1), 1e-3, 1e3)
        in_range("rope_base", self.rope_base, 1e-6, 1e12)
        in_range("norm_eps", self.norm_eps, 0, 1)
        in_range("class_dropout_prob", self.class_dropout_prob, 0, 1)
        for side in self.grid if isinstance(self.grid, tuple) else (_given(self.grid, 1),):
            in_range("a side of grid", side, 1, MOST_SIDE)
        if any(getattr(self, name) is not None for name in NAMED):
            self._require_fitting()

    def sizes(self) -> tuple[int, int, int]:
        """``NAMED``; a UserError where some of them are absent."""
        dim, layers, heads = self.dim, self.n_layer, self.n_head
        if dim is None or layers is None or heads is None:
            given = [name for name in NAMED if getattr(self, name) is not None]
            absent = [name for name in NAMED if name not in given]
            raise UserError(f"it gives {', '.join(given)}, but no {', '.join(absent)}")
        return dim, layers, heads

    def _require_fitting(self) -> None:
        """Raises UserError if hyper-parameters of the decoder are missing or contradict one another."""
        dim, _, heads = self.sizes()
        width = dim // heads
        if dim % heads or heads % _given(self.n_kv_head, heads) or self.head_dim not in (None, width):
            raise UserError(
                f"dim={self.dim}, n_head={heads}, n_kv_head={self.n_kv_head} and head_dim={self.head_dim} do not fit: "
                "dim is n_head · head_dim, and n_head a multiple of n_kv_head"
            )
        if width % 4:
            raise UserError(
                f"heads have {width} channels (dim / n_head); rotary positions of a grid need a multiple of 4"
            )
        if self.multiple_of and self.ffn_hidden not in (None, self.computed_hidden()):
            raise UserError(f"ffn_hidden={self.ffn_hidden}, but dim and multiple_of make {self.computed_hidden()}")
        if self.family == "c2i" and self.cls_token_num not in (None, 1):
            raise UserError(f"cls_token_num={self.cls_token_num}, but a class (family c2i) is one token")
        if self.block_size is not None and self.grid is not None and math.prod(self.sides()) != self.block_size:
            raise UserError(f"block_size={self.block_size} is not the number of codes of grid={self.grid}")
        if math.prod(self.sides()) != _given(self.block_size, math.prod(self.sides())):
            raise UserError(f"block_size={self.block_size} is no square; give the grid: [height, width]")

    def computed_hidden(self) -> int:
        """Returns the MLP width by the official rule: 8/3 of ``dim``, times a factor, rounded up to a multiple."""
        hidden = int(2 * (4 * self.sizes()[0]) / 3)
        hidden = int(hidden * _given(self.ffn_dim_multiplier, 1))
        multiple = _given(self.multiple_of, 256)
        return -(-hidden // multiple) * multiple

    def sides(self) -> tuple[int, int]:
        """Returns the height and width of the grid in codes."""
        side = _given(self.grid, math.isqrt(_given(self.block_size, math.prod(LlamaGenConfig.grid))))
        return side if isinstance(side, tuple) else (side, side)


def read_config(directory: Path) -> LlamaGenConfig:
    """Returns the shape of the model in a folder.

    Raises:
      UserError: if the config is damaged, or has values of the wrong type, out of range or in contradiction.
    """
    path, content = directory / "config.json", read_json(directory)
    try:
        fields = parse(ModelFields, content, path.name, ignore_unknown=True)
        section = (fields.vq, f"{path.name}.vq") if fields.vq is not None else (content, path.name)
        tokens = fields.cls_token_num
        vision = _vision(parse(TokenizerFields, *section, ignore_unknown=True))
        return LlamaGenConfig(
            family=fields.family,
            language=None if fields.dim is None else _language(fields),
            vision=vision,
            classes=fields.num_classes,
            caption_width=fields.caption_dim,
            caption_tokens=LlamaGenConfig.caption_tokens if tokens is None or fields.family == "c2i" else tokens,
            guided=fields.class_dropout_prob > 0,
            faid=read_faid(fields),
        ).with_grid(fields.sides())
    except UserError as error:
        raise UserError(f"{path} describes no LlamaGen ({error}); mend it, or copy the checkpoint again") from error


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _language(fields: ModelFields) -> LlamaConfig:
    width, layers, heads = fields.sizes()
    return LlamaConfig(
        vocab_size=fields.vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=_given(fields.n_kv_head, heads),
        mlp=_given(fields.ffn_hidden, fields.computed_hidden()),
        rope_theta=fields.rope_base,
        norm_eps=fields.norm_eps,
        rotary="positions",
        joined=True,
    )


def _vision(fields: TokenizerFields) -> VQConfig:
    decoder = fields.decoder_ch_mult
    return VQConfig(
        codebook_size=fields.codebook_size,
        code_dim=fields.codebook_embed_dim,
        channels=fields.ch,
        multipliers=fields.encoder_ch_mult,
        decoder_multipliers=None if decoder in ((), fields.encoder_ch_mult) else decoder,
        z_channels=fields.z_channels,
        res_blocks=fields.num_res_blocks,
        norm_groups=fields.groupnorm_groups,
        norm_eps=fields.groupnorm_eps,
        unit_codes=fields.codebook_l2_norm,
    )


def config_to_json(config: LlamaGenConfig) -> dict[str, Any]:
    """Returns the ``config.json`` of a shape; ``read_config`` returns the same shape from it."""
    vision, language, faid = config.vision, config.language, config.faid
    form = {
        "model_type": MODEL_TYPE,
        "family": config.family,
        "grid": list(config.grid),
        "block_size": math.prod(config.grid),
        "num_classes": config.classes,
        "caption_dim": config.caption_width,
        "cls_token_num": 1 if config.family == "c2i" else config.caption_tokens,
        "class_dropout_prob": 0.1 if config.guided else 0.0,
        "vq": {
            "ch": vision.channels,
            "groupnorm_groups": vision.norm_groups,
            "groupnorm_eps": vision.norm_eps,
            "encoder_ch_mult": list(vision.multipliers),
            "decoder_ch_mult": list(vision.decoder_multipliers or vision.multipliers),
            "z_channels": vision.z_channels,
            "codebook_size": vision.codebook_size,
            "codebook_embed_dim": vision.code_dim,
            "codebook_l2_norm": vision.unit_codes,
            "num_res_blocks": vision.res_blocks,
            "downsample": vision.downsampling,
        },
    }
    if language is not None:
        form |= {
            "dim": language.width,
            "n_layer": language.layers,
            "n_head": language.heads,
            "n_kv_head": language.kv_heads,
            "ffn_hidden": language.mlp,
            "rope_base": language.rope_theta,
            "norm_eps": language.norm_eps,
            "vocab_size": language.vocab_size,
        }
    if faid is not None:
        form |= {"num_SmoothPatchBlender": faid.stride, "num_hop": list(faid.hops)}
        form["retrieved_key_num"] = faid.neighbors
    return form


def _published(layers: int, heads: int, width: int, **more: Any) -> LlamaGenConfig:
    fields = ModelFields("c2i", dim=width, n_layer=layers, n_head=heads)
    return LlamaGenConfig(language=_language(fields), **more)


# The published sizes for images of 256 pixels. ``with_grid((24, 24))`` is the grid of 384 pixels, (32, 32) of 512.
PRESETS = {
    "llamagen-c2i-b": _published(12, 12, 768),
    "llamagen-c2i-l": _published(24, 16, 1024),
    "llamagen-c2i-xl": _published(36, 20, 1280),
    "llamagen-c2i-xxl": _published(48, 24, 1536),
    "llamagen-c2i-3b": _published(24, 32, 3200),
    "llamagen-t2i-xl": _published(36, 20, 1280, family="t2i"),
}
