"""``config.json`` of a checkpoint folder: that of Janus-Pro and FAiD as published, or that of ``transformers``.

Ours is the published form with two keys of our own where it is silent: ``image_grid`` [H, W] (absent = what the
image-understanding tower's image size gives, else 24 x 24) and, in ``gen_vision_config.params``, the fields of
``nn.vq.VQConfig`` (absent = VQ-16's). A folder that holds the image tokenizer alone has neither ``language_config``
nor the sections of what stands beside it. A LoRA kept apart has the PEFT library's ``adapter_config.json``.
"""

import json
import operator
import re
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.models.layouts import PUBLISHED, TRANSFORMERS, Layout
from arrag_jax.models.presets import PAD, JanusConfig
from arrag_jax.models.tensor_files import ADAPTER, checkpoint_folder
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.transformer import LlamaConfig
from arrag_jax.nn.vq import VQConfig

# Both forms leave out what is the default of transformers' LlamaConfig (Janus-Pro-7B's gives little but its depth).
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def read_config(directory: Path) -> JanusConfig:
    """Shape of the model in a folder.

    Raises:
      UserError: no such file, no JSON, or the config of another kind of model.
    """
    directory = checkpoint_folder(directory)
    return parse_config(read_json(directory), directory)


def require_language(config: JanusConfig, directory: Path) -> None:
    """Raises UserError, with the mend, where a folder's model is an image tokenizer alone, which cannot draw."""
    if not config.draws:
        raise UserError(
            f"{directory} holds an image tokenizer alone, without the language model that draws; train one on it: "
            f"python -m arrag_jax.train --config configs/emoji_prior.py --config.options.tokenizer={directory} "
            "--workdir runs/prior"
        )


def read_json(directory: Path) -> dict[str, Any]:
    """A folder's config as it stands there."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint folder: it holds no config.json")
    return _object(path)


def layout_of(config: dict[str, Any]) -> Layout:
    """How the tensors beside this config are named."""
    return TRANSFORMERS if config.get("model_type") == "janus" and "vq_config" in config else PUBLISHED


def parse_config(config: dict[str, Any], directory: Path) -> JanusConfig:
    """Shape of the model that a config describes; ``directory`` holds it and, where it is silent, the pad id."""
    path = directory / "config.json"
    try:
        return _from_transformers(config, path) if layout_of(config) is TRANSFORMERS else _from_published(config, path)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds a value of the wrong kind ({error}); copy the checkpoint again") from error


def _from_published(config: dict[str, Any], path: Path) -> JanusConfig:
    missing = [k for k in ("language_config", "gen_vision_config", "gen_head_config") if k not in config]
    if missing and missing != ["language_config", "gen_head_config"]:
        kind = config.get("model_type", "unknown")
        raise UserError(f"{path} is the config of another model (model_type {kind!r}): it has no {missing[0]}")
    base, params = JanusConfig(), config["gen_vision_config"].get("params", {})
    text, default = config.get("language_config"), base.vision
    aligner = config.get("gen_aligner_config", {}).get("params", {})
    if aligner.get("projector_type", "mlp_gelu") != "mlp_gelu":
        raise UserError(f"{path} asks for the aligner {aligner['projector_type']!r} of codes; only 'mlp_gelu' is known")
    multipliers = tuple(params.get("encoder_ch_mult", default.multipliers))
    vision = VQConfig(
        codebook_size=params.get("image_token_size", default.codebook_size),
        code_dim=params.get("n_embed", default.code_dim),
        channels=params.get("ch", default.channels),
        multipliers=multipliers,
        decoder_multipliers=_unless_equal(tuple(params.get("decoder_ch_mult", multipliers)), multipliers),
        z_channels=params.get("z_channels", default.z_channels),
        res_blocks=params.get("num_res_blocks", default.res_blocks),
        norm_scope=params.get("norm_scope", default.norm_scope),
        encoder_kernel=params.get("encoder_kernel", default.encoder_kernel),
        middle=params.get("middle", default.middle),
    )
    size = ((config.get("vision_config") or {}).get("params") or {}).get("image_size")
    side = size // vision.downsampling if size else base.grid[0]
    grid = config.get("image_grid") or (side, side)
    if text is None:
        return JanusConfig(language=None, vision=vision).with_grid(grid)
    language = _language(text, path)
    return JanusConfig(
        language=language,
        vision=vision,
        aligner_depth=aligner.get("depth", base.aligner_depth),
        head_width=config["gen_head_config"].get("params", {}).get("image_token_embed", language.width),
        pad_id=_pad_id(text, language, path),
        max_positions=_max_positions(text),
        faid=_faid(text),
    ).with_grid(grid)


def _from_transformers(config: dict[str, Any], path: Path) -> JanusConfig:
    base, text, vq = JanusConfig(), config.get("text_config") or {}, config["vq_config"]
    tower = config.get("vision_config") or {}
    vision, language = base.vision, _language(text, path)
    if vq.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} asks for the activation {vq['hidden_act']!r} before image codes; only gelu is known")
    side = tower.get("image_size", 384) // tower.get("patch_size", 16)
    return JanusConfig(
        language=language,
        vision=VQConfig(
            codebook_size=vq.get("num_embeddings", vision.codebook_size),
            code_dim=vq.get("embed_dim", vision.code_dim),
            channels=vq.get("base_channels", vision.channels),
            multipliers=tuple(vq.get("channel_multiplier", vision.multipliers)),
            z_channels=vq.get("latent_channels", vision.z_channels),
            res_blocks=vq.get("num_res_blocks", vision.res_blocks),
        ),
        grid=(side, side),
        aligner_depth=vq.get("num_hidden_layers", base.aligner_depth),
        head_width=vq.get("projection_dim", base.head_width),
        pad_id=_pad_id(text, language, path),
        max_positions=_max_positions(text),
        faid=_faid(text),
    )


def _language(text: dict[str, Any], path: Path) -> LlamaConfig:
    """The language model; the library's newer configs put the rotary numbers into a section of their own."""
    text = {**_LLAMA, **text}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or text["hidden_act"] != "silu":
        raise UserError(
            f"{path} asks for rotary positions {kind!r} and the activation {text['hidden_act']!r}; "
            "only 'default' and 'silu' are known"
        )
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return LlamaConfig(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_dim=_unless_equal(text.get("head_dim"), head_dim),
        mlp=text["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", LlamaConfig.rope_theta))),
        norm_eps=text["rms_norm_eps"],
    )


def _unless_equal(value: Any, usual: Any) -> Any:
    """None where a key says what follows from the others anyway."""
    return None if value == usual else value


def _pad_id(text: dict[str, Any], language: LlamaConfig, path: Path) -> int:
    """The config's, else that of the files beside it; published configs name none.

    Janus-Pro's is 100002, and a smaller vocabulary keeps its last id for it.
    """
    beside = path.parent / "generation_config.json"
    given = text.get("pad_token_id"), _object(beside).get("pad_token_id") if beside.is_file() else None
    usual = min(JanusConfig.pad_id, language.vocab_size - 1)
    pad = next((i for i in given if i is not None and i >= 0), None)
    return _tokenizers_pad(path.parent / "tokenizer.json", usual) if pad is None else pad


def _max_positions(text: dict[str, Any]) -> int | None:
    given = text.get("max_position_embeddings")
    return None if given is None else operator.index(given)


def _tokenizers_pad(path: Path, usual: int) -> int:
    """Id of the token in a tokenizer.json that is Janus' pad, or at least is called so."""
    added = _object(path).get("added_tokens", []) if path.is_file() else []
    ids = {token.get("content", ""): token.get("id", usual) for token in added}
    called = [i for name, i in ids.items() if re.sub(r"[^a-z]", "", name.lower()) == "pad"]
    return ids.get(PAD, called[0] if called else usual)


def _faid(text: dict[str, Any]) -> FaidConfig | None:
    """FAiD's keys stand among the language model's; K is not published and is 10 (reference quirk 10)."""
    stride, hops, neighbors = (text.get(key) for key in ("num_SmoothPatchBlender", "num_hop", "retrieved_key_num"))
    if stride is None and hops is None:
        return None
    hops = FaidConfig.hops if hops is None else sorted(hops if isinstance(hops, list) else [hops])
    return FaidConfig(
        stride=FaidConfig.stride if stride is None else stride,
        hops=tuple(hops),
        neighbors=FaidConfig.neighbors if neighbors is None else neighbors,
    )


def read_lora(directory: Path) -> LoraConfig | None:
    """The LoRA that a folder keeps beside its weights; None where there is none.

    Raises:
      UserError: an adapter without its config, or of a kind that is not plain LoRA.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        adapter = next(directory.glob(f"{ADAPTER}.*"), None)
        if adapter is not None:
            raise UserError(f"{adapter} needs an adapter_config.json beside it, with r and lora_alpha")
        return None
    config = _object(path)
    other = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if other:
        raise UserError(f"{path} asks for {other[0]}, which is not known here: merge the adapter where it was made")
    if not {"r", "lora_alpha"} <= config.keys():
        raise UserError(f"{path} does not give r and lora_alpha; copy the checkpoint again")
    return LoraConfig(config["r"], float(config["lora_alpha"]), config.get("lora_dropout", 0.0))


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; copy the checkpoint again")
    return value


def config_to_json(config: JanusConfig) -> dict[str, Any]:
    """The published form of a config; ``read_config`` of it gives the same config back."""
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
    """The sections of the language model and of what joins it to the tokenizer."""
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
