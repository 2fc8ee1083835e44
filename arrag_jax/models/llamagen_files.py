"""Reads and writes the folder of a LlamaGen: ``config.json``, the weights, and the files that its prompts need.

The weights have their official names. They are in ``model.safetensors`` (or in several files with an index) or in a
published ``.pt``. The weights of the image tokenizer are in the same file, which is how we write them, or in a file of
their own, ``vq*.safetensors`` or ``vq*.pt``.
"""

import re
from pathlib import Path

from jax.sharding import Mesh

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike, PromptEncoder
from arrag_jax.models.family import Family
from arrag_jax.models.folder import filled, require_room, write_folder
from arrag_jax.models.layouts import Layout
from arrag_jax.models.llamagen import PARTS, VISION, LlamaGen
from arrag_jax.models.llamagen_config import MODEL_TYPE, PRESETS, config_to_json, read_config
from arrag_jax.models.llamagen_prompts import CaptionEncoder, ClassNumbers
from arrag_jax.models.tensor_files import Stored, stored_tensors
from arrag_jax.nn.abstract import abstract

TOKENIZER = ("vq*.safetensors", "vq*.pt")
TOKENIZER_KEY = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\..*")
_LAYER = r"language_model\.layers\.(\d+)\."

LAYOUT = Layout(
    names=(
        (rf"{_LAYER}attention\.qkv\.", r"layers.\1.attention.wqkv."),
        (rf"{_LAYER}attention\.o\.", r"layers.\1.attention.wo."),
        (rf"{_LAYER}mlp\.gate\.", r"layers.\1.feed_forward.w1."),
        (rf"{_LAYER}mlp\.down\.", r"layers.\1.feed_forward.w2."),
        (rf"{_LAYER}mlp\.up\.", r"layers.\1.feed_forward.w3."),
        (rf"{_LAYER}input_norm\.", r"layers.\1.attention_norm."),
        (rf"{_LAYER}mlp_norm\.", r"layers.\1.ffn_norm."),
        (rf"{_LAYER}blender\.norm_scale$", r"layers.\1.blender.norm.weight"),
        (rf"{_LAYER}blender\.", r"layers.\1.blender."),
        (r"language_model\.embed_tokens\.", "tok_embeddings."),
        (r"language_model\.norm\.", "norm."),
        (r"gen_head\.", "output."),
        (r"cls_embedding\.(fc\d)\.", r"cls_embedding.cap_proj.\1."),
        (r"gen_vision_model\.(.*\.(?:up|down)sample)\.", r"\1.conv."),
        (r"gen_vision_model\.codes$", "quantize.embedding.weight"),
        (r"gen_vision_model\.", ""),
    ),
    rules=(),
    parts={},
    unused=re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\..*|quantize\.codebook_used"),
)


def _open(
    directory: Path, also: tuple[str, ...] = (), parts: tuple[str, ...] | None = None
) -> tuple[LlamaGen, Layout, dict[str, Stored]]:
    """Returns the abstract model of a folder (shapes without numbers), its layout, and its tensors by key.

    Args:
      also: further files to look for tensors in.
      parts: the parts to build; None = all parts that the folder holds.

    Raises:
      UserError: if a part is missing, or the config describes a larger model than the tensors hold.
    """
    shape, stored = read_config(directory), stored_tensors(directory, tuple(dict.fromkeys((*TOKENIZER, *also))))
    held = {key: tensor for key, tensor in stored.items() if TOKENIZER_KEY.fullmatch(key)}
    path = directory / "config.json"
    if parts is None:
        present = {
            "gen_vision_model": bool(held),
            **dict.fromkeys(set(PARTS) - set(VISION), shape.language is not None),
        }
        parts = tuple(part for part in PARTS if present[part])
    if VISION[0] not in parts:
        stored = {key: tensor for key, tensor in stored.items() if key not in held}
    if parts == VISION:
        stored = held
        if not held:
            raise UserError(f"{directory} holds no image tokenizer; put its vq.safetensors or vq*.pt there")
    elif shape.language is None:
        raise UserError(f"{path} gives no dim, n_layer and n_head: it describes an image tokenizer alone")
    require_room(shape, stored, parts, path)
    if set(parts) == set(PARTS) and shape.vision.codebook_size < shape.decoder.vocab_size:
        raise UserError(
            f"{path} gives a tokenizer of {shape.vision.codebook_size} codes, but the model draws "
            f"{shape.decoder.vocab_size}; put the tokenizer there that the model was trained with"
        )
    return abstract(LlamaGen, config=shape, parts=parts), LAYOUT, stored


def _load(
    directory: Path,
    dtype: str,
    grid: ArrayLike,
    mesh: Mesh | None = None,
    int8: bool = False,
    parts: tuple[str, ...] | None = None,
) -> LlamaGen:
    """Returns the model in a folder with the named parts; the other parts are None."""
    model, layout, stored = _open(directory, (), parts)
    return filled(model, layout, stored, directory, dtype, grid, mesh, int8)


def _save(model: LlamaGen, directory: Path, dtype: str) -> None:
    write_folder(model, directory, dtype, LAYOUT, config_to_json(model.config))


def _prompts(directory: Path) -> PromptEncoder:
    config = read_config(directory)
    if config.family == "c2i":
        return ClassNumbers(config.classes)
    return CaptionEncoder(directory, config.caption_width, config.caption_tokens)


LLAMAGEN = Family(
    model_types=(MODEL_TYPE,),
    kind=LlamaGen,
    read_config=read_config,
    load=_load,
    load_tokenizer=lambda directory: _load(directory, "float32", None, parts=VISION),
    save=_save,
    prompts=_prompts,
    open=_open,
    layout_of=lambda config: LAYOUT,
    layouts={"ours": LAYOUT, MODEL_TYPE: LAYOUT},
    to_json=config_to_json,
    presets=PRESETS,
    files=TOKENIZER,
)
