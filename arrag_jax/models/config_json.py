"""Reads and writes ``config.json`` of a Janus, in the published form of Janus-Pro and FAiD or that of ``transformers``.

We write the published form and add what it lacks: ``image_grid`` [H, W] (if absent, the grid follows from the image
size of the image-understanding tower, else it is 24 x 24) and, in ``gen_vision_config.params``, the fields of
``nn.vq.VQConfig`` (if absent, those of VQ-16). The config of an image tokenizer alone has no ``language_config`` and no
sections for the other parts. A LoRA that is not merged has the PEFT library's ``adapter_config.json``.
"""

import re
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.json_files import read_object
from arrag_jax.models.layouts import PUBLISHED, TRANSFORMERS, Layout
from arrag_jax.models.manifest import require_written
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.presets import PAD, JanusConfig
from arrag_jax.models.schema import (
    AdapterConfig,
    GenerationConfig,
    ImageSize,
    PublishedConfig,
    TextSection,
    TokenizerFile,
    TransformersConfig,
)
from arrag_jax.models.tensor_files import ADAPTER
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.parsing import parse, shown


def read_config(directory: Path) -> JanusConfig:
    """Returns the shape of the model in a folder.

    Raises:
      UserError: if there is no config, it is not JSON, or it describes another kind of model.
    """
    directory = checkpoint_folder(directory)
    return parse_config(read_json(directory), directory)


def require_language(config: JanusConfig, directory: Path) -> None:
    """Raises UserError if a folder's model is an image tokenizer alone; the message says how to train a prior on it."""
    if not config.draws:
        raise UserError(
            f"{directory} holds an image tokenizer alone, without the language model that draws; train one on it: "
            f"python -m arrag_jax.train --config configs/emoji_prior.py --config.options.tokenizer={directory} "
            "--workdir runs/prior"
        )


def read_json(directory: Path) -> dict[str, Any]:
    """Returns the content of a folder's ``config.json``.

    Raises:
      UserError: if the file is absent, is not JSON, or does not match the hash in the folder's manifest.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint folder: it holds no config.json")
    require_written(path)
    return _object(path)


def layout_of(config: dict[str, Any]) -> Layout:
    """Returns the layout of the tensors in the folder of this config."""
    return TRANSFORMERS if config.get("model_type") == "janus" and "vq_config" in config else PUBLISHED


def parse_config(config: dict[str, Any], directory: Path) -> JanusConfig:
    """Returns the shape of the model that a config describes.

    Args:
      directory: the folder of the config. If the config gives no pad id, other files of this folder do.

    Raises:
      UserError: if the config describes another kind of model, or has values of the wrong type, out of range or in
        contradiction.
    """
    path = directory / "config.json"
    try:
        return _from_transformers(config, path) if layout_of(config) is TRANSFORMERS else _from_published(config, path)
    except UserError as error:
        message = str(error)
        raise UserError(message if str(directory) in message else f"{path}: {message}") from error


def _from_published(config: dict[str, Any], path: Path) -> JanusConfig:
    missing = [k for k in ("language_config", "gen_vision_config", "gen_head_config") if k not in config]
    if missing and missing != ["language_config", "gen_head_config"]:
        kind = shown(config.get("model_type", "unknown"))
        raise UserError(f"{path} is the config of another model (model_type {kind}): it has no {missing[0]}")
    given = _schema(PublishedConfig, config, path)
    text, params, aligner = given.language_config, given.gen_vision_config.params, given.gen_aligner_config.params
    if aligner.projector_type != "mlp_gelu":
        raise UserError(
            f"{path} asks for the aligner {shown(aligner.projector_type)} of codes; only 'mlp_gelu' is known"
        )
    vision = VQConfig(
        codebook_size=params.image_token_size,
        code_dim=params.n_embed,
        channels=params.ch,
        multipliers=params.encoder_ch_mult,
        decoder_multipliers=_unless_equal(params.decoder_ch_mult or params.encoder_ch_mult, params.encoder_ch_mult),
        z_channels=params.z_channels,
        res_blocks=params.num_res_blocks,
        norm_scope=params.norm_scope,
        encoder_kernel=params.encoder_kernel,
        middle=params.middle,
    )
    tower = given.vision_config and given.vision_config.params
    side = tower.image_size // vision.downsampling if tower and tower.image_size else JanusConfig.grid[0]
    grid = given.image_grid or (side, side)
    if text is None:
        return JanusConfig(language=None, vision=vision).with_grid(grid)
    language = _language(text, path)
    return JanusConfig(
        language=language,
        vision=vision,
        aligner_depth=aligner.depth,
        head_width=given.gen_head_config.params.image_token_embed or language.width,
        pad_id=_pad_id(text, language, path),
        max_positions=text.max_position_embeddings,
        faid=read_faid(text),
    ).with_grid(grid)


def _from_transformers(config: dict[str, Any], path: Path) -> JanusConfig:
    given = _schema(TransformersConfig, config, path)
    text, vq, tower = given.text_config or TextSection(), given.vq_config, given.vision_config or ImageSize()
    language = _language(text, path)
    if vq.hidden_act != "gelu":
        raise UserError(f"{path} asks for the activation {shown(vq.hidden_act)} before image codes; only gelu is known")
    side = (384 if tower.image_size is None else tower.image_size) // tower.patch_size
    return JanusConfig(
        language=language,
        vision=VQConfig(
            codebook_size=vq.num_embeddings,
            code_dim=vq.embed_dim,
            channels=vq.base_channels,
            multipliers=vq.channel_multiplier,
            z_channels=vq.latent_channels,
            res_blocks=vq.num_res_blocks,
        ),
        aligner_depth=vq.num_hidden_layers,
        head_width=vq.projection_dim,
        pad_id=_pad_id(text, language, path),
        max_positions=text.max_position_embeddings,
        faid=read_faid(text),
    ).with_grid((side, side))


def _language(text: TextSection, path: Path) -> LlamaConfig:
    """Returns the shape of the language model."""
    if text.rope.kind != "default" or text.hidden_act != "silu":
        raise UserError(
            f"{path} asks for rotary positions {shown(text.rope.kind)} and the activation {shown(text.hidden_act)}; "
            "only 'default' and 'silu' are known"
        )
    return LlamaConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=_unless_equal(text.head_dim, text.hidden_size // text.num_attention_heads),
        mlp=text.intermediate_size,
        rope_theta=text.rope_theta if text.rope.rope_theta is None else text.rope.rope_theta,
        norm_eps=text.rms_norm_eps,
    )


def _unless_equal(value: Any, usual: Any) -> Any:
    """Returns None if a key has the value that follows from other keys, else the value."""
    return None if value == usual else value


def _pad_id(text: TextSection, language: LlamaConfig, path: Path) -> int:
    """Returns the pad id of the config, else of the other files in its folder, because published configs give none.

    The default is Janus-Pro's 100002, or the last id of a smaller vocabulary.
    """
    beside, tokenizer = path.parent / "generation_config.json", path.parent / "tokenizer.json"
    given = text.pad_token_id, _read(GenerationConfig, beside).pad_token_id if beside.is_file() else None
    usual = min(JanusConfig.pad_id, language.vocab_size - 1)
    pad = next((i for i in given if i is not None and i >= 0), None)
    if pad is not None or not tokenizer.is_file():
        return usual if pad is None else pad
    ids = {x.content: usual if x.id is None else x.id for x in _read(TokenizerFile, tokenizer).added_tokens}
    called = [i for name, i in ids.items() if re.sub(r"[^a-z]", "", name.lower()) == "pad"]
    return ids.get(PAD, called[0] if called else usual)


def read_faid(section: Any) -> FaidConfig | None:
    """Returns the shape of FAiD's blenders, from their published keys in a parsed section; None if there are none.

    K is not published; the default is 10 (docs/reference.md quirk 10).
    """
    stride, hops, neighbors = section.num_SmoothPatchBlender, section.num_hop, section.retrieved_key_num
    if stride is None and hops is None:
        return None
    return FaidConfig(
        stride=FaidConfig.stride if stride is None else stride,
        hops=FaidConfig.hops if hops is None else tuple(sorted(hops if isinstance(hops, tuple) else [hops])),
        neighbors=FaidConfig.neighbors if neighbors is None else neighbors,
    )


def read_lora(directory: Path) -> LoraConfig | None:
    """Returns the config of a folder's LoRA adapter; None if there is no adapter.

    Raises:
      UserError: if an adapter has no config, or is not plain LoRA.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        adapter = next(directory.glob(f"{ADAPTER}.*"), None)
        if adapter is not None:
            raise UserError(f"{adapter} needs an adapter_config.json beside it, with r and lora_alpha")
        return None
    content = _object(path)
    if not {"r", "lora_alpha"} <= content.keys():
        raise UserError(f"{path} does not give r and lora_alpha; copy the checkpoint again")
    config = _schema(AdapterConfig, content, path)
    other = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if getattr(config, key)]
    if other:
        raise UserError(f"{path} asks for {other[0]}, which is not known here: merge the adapter where it was made")
    try:
        return LoraConfig(config.r, config.lora_alpha, config.lora_dropout)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read(schema: type, path: Path) -> Any:
    """Returns a JSON file parsed by a schema; every error names the file."""
    return _schema(schema, _object(path), path)


def _schema(schema: type, content: dict[str, Any], path: Path) -> Any:
    try:
        return parse(schema, content, path.name, ignore_unknown=True)
    except UserError as error:
        raise UserError(f"{path} holds a value of the wrong kind ({error}); copy the checkpoint again") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError as error:
        raise UserError(f"{error}; copy the checkpoint again") from error


def config_to_json(config: JanusConfig) -> dict[str, Any]:
    """Returns the published form of a config; ``read_config`` returns the same config from it."""
    vision, language = config.vision, config.language
    form = {
        "model_type": "multi_modality",
        "image_grid": list(config.grid),
        "gen_vision_config": {
            "cls": "VQ-16",
            "params": {
                "image_token_size": vision.codebook_size,
                "n_embed": vision.code_dim,
                "ch": vision.channels,
                "encoder_ch_mult": list(vision.multipliers),
                "decoder_ch_mult": list(vision.decoder_multipliers or vision.multipliers),
                "z_channels": vision.z_channels,
                "num_res_blocks": vision.res_blocks,
                "norm_scope": vision.norm_scope,
                "encoder_kernel": vision.encoder_kernel,
                "middle": vision.middle,
            },
        },
    }
    return form if language is None else form | _language_to_json(config, language)


def _language_to_json(config: JanusConfig, language: LlamaConfig) -> dict[str, Any]:
    """Returns the sections of the language model and of the parts that join it to the tokenizer."""
    vision, faid = config.vision, config.faid
    blending = (
        {}
        if faid is None
        else {"num_SmoothPatchBlender": faid.stride, "num_hop": list(faid.hops), "retrieved_key_num": faid.neighbors}
    )
    return {
        "language_config": {
            "model_type": "llama",
            "vocab_size": language.vocab_size,
            "hidden_size": language.width,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "intermediate_size": language.mlp,
            "rope_theta": language.rope_theta,
            "rms_norm_eps": language.norm_eps,
            "pad_token_id": config.pad_id,
            **({} if config.max_positions is None else {"max_position_embeddings": config.max_positions}),
            **({} if language.head_dim is None else {"head_dim": language.head_dim}),
            **blending,
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "params": {
                "projector_type": "mlp_gelu",
                "depth": config.aligner_depth,
                "input_dim": vision.code_dim,
                "n_embed": language.width,
            },
        },
        "gen_head_config": {
            "cls": "vision_head",
            "params": {
                "image_token_embed": config.head_width,
                "image_token_size": vision.codebook_size,
                "n_embed": language.width,
            },
        },
    }
