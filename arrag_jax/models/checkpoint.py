"""A model's folder: ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

The layout is the one in which Janus-Pro is published, with two keys of our own where its config is
silent: ``image_grid`` [H, W] (absent = 24 x 24) and, in ``gen_vision_config.params``, the fields of
``nn.vq.VQConfig`` (absent = VQ-16's).
"""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrag_jax.errors import UserError
from arrag_jax.models.janus import PARTS, VISION, Janus
from arrag_jax.models.presets import JanusConfig
from arrag_jax.models.weights import DTYPES, parameters, read_weights, write_weights
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.transformer import LlamaConfig
from arrag_jax.nn.vq import VQConfig


def load_model(directory: str | Path, dtype: str = "float32", parts: tuple[str, ...] = PARTS) -> Janus:
    """Reads a checkpoint folder.

    Args:
      directory: holds config.json and model.safetensors (or shards with an index).
      dtype: of the parameters: float32, bfloat16 or float16; the tokenizer stays in float32.
      parts: the parts to read, e.g. ``VISION`` for the tokenizer alone; the others are None.

    Raises:
      UserError: the folder, its config or its weights are not a Janus; the message names what is wrong.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    config = read_config(directory)
    model = nnx.eval_shape(lambda: Janus(config, nnx.Rngs(0), parts))
    read_weights(model, directory, dtype)
    if model.gen_vision_model is not None:
        size, dim = config.vision.codebook_size, config.vision.code_dim
        model.gen_vision_model.usage.set_value(jnp.full((size,), 1.0 / size))
        model.gen_vision_model.spare.set_value(jnp.zeros((size, dim)))
    return model


def save_model(model: Janus, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors; the config comes last, so a killed save is no checkpoint."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    write_weights(model, directory / "model.safetensors.part", dtype)
    (directory / "model.safetensors.part").replace(directory / "model.safetensors")
    text = json.dumps(config_to_json(model.config), indent=2)
    (directory / "config.json.part").write_text(text + "\n")
    (directory / "config.json.part").replace(directory / "config.json")


def fingerprint(model: Janus) -> str:
    """Identity of a tokenizer: sha256 over its parameters in float32, sixteen hex digits.

    Two models have it in common exactly if they give images the same codes and codes the same vectors.
    """
    digest = hashlib.sha256()
    for name, value in sorted(parameters(model).items()):
        if not name.startswith(VISION):
            continue
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(value[...], np.float32)).tobytes())
    return digest.hexdigest()[:16]


def read_config(directory: Path) -> JanusConfig:
    """Shape of the model from a published config.json.

    Raises:
      UserError: no such file, no JSON, or the config of another kind of model.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint folder: it holds no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the checkpoint again") from error
    missing = [k for k in ("language_config", "gen_vision_config", "gen_head_config") if k not in config]
    if missing:
        kind = config.get("model_type", "unknown")
        raise UserError(f"{path} is the config of another model (model_type {kind!r}): it has no {missing[0]}")
    base, text, params = JanusConfig(), config["language_config"], config["gen_vision_config"].get("params", {})
    language, vision, head = base.language, base.vision, config["gen_head_config"].get("params", {})
    heads = text.get("num_attention_heads", language.heads)
    return JanusConfig(
        language=LlamaConfig(
            vocab_size=text.get("vocab_size", language.vocab_size),
            width=text.get("hidden_size", language.width),
            layers=text.get("num_hidden_layers", language.layers),
            heads=heads,
            kv_heads=text.get("num_key_value_heads", heads),
            mlp=text.get("intermediate_size", language.mlp),
            rope_theta=float(text.get("rope_theta", language.rope_theta)),
            norm_eps=text.get("rms_norm_eps", language.norm_eps),
        ),
        vision=VQConfig(
            codebook_size=params.get("image_token_size", vision.codebook_size),
            code_dim=params.get("n_embed", vision.code_dim),
            channels=params.get("ch", vision.channels),
            multipliers=tuple(params.get("encoder_ch_mult", vision.multipliers)),
            z_channels=params.get("z_channels", vision.z_channels),
            res_blocks=params.get("num_res_blocks", vision.res_blocks),
            norm_scope=params.get("norm_scope", vision.norm_scope),
            encoder_kernel=params.get("encoder_kernel", vision.encoder_kernel),
            middle=params.get("middle", vision.middle),
        ),
        grid=tuple(config.get("image_grid", base.grid)),
        aligner_depth=config.get("gen_aligner_config", {}).get("params", {}).get("depth", base.aligner_depth),
        head_width=head.get("image_token_embed", base.head_width),
        # Published configs name no pad; Janus-Pro's is 100002, and a smaller vocabulary keeps its last id for it.
        pad_id=text.get("pad_token_id", min(base.pad_id, text.get("vocab_size", language.vocab_size) - 1)),
        faid=_read_faid(text),
    )


def _read_faid(text: dict) -> FaidConfig | None:
    """FAiD's keys stand among the language model's; K is not published and is 10 (reference quirk 10)."""
    if "num_SmoothPatchBlender" not in text:
        return None
    return FaidConfig(
        stride=text["num_SmoothPatchBlender"],
        hops=tuple(text.get("num_hop", FaidConfig.hops)),
        neighbors=text.get("retrieved_key_num", FaidConfig.neighbors),
    )


def config_to_json(config: JanusConfig) -> dict:
    """The published form of a config; ``read_config`` of it gives the same config back."""
    language, vision, faid = config.language, config.vision, config.faid
    blending = (
        {}
        if faid is None
        else {"num_SmoothPatchBlender": faid.stride, "num_hop": list(faid.hops), "retrieved_key_num": faid.neighbors}
    )
    return {
        "model_type": "multi_modality",
        "image_grid": list(config.grid),
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
            **blending,
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "params": {
                "image_token_size": vision.codebook_size,
                "n_embed": vision.code_dim,
                "ch": vision.channels,
                "encoder_ch_mult": list(vision.multipliers),
                "decoder_ch_mult": list(vision.multipliers),
                "z_channels": vision.z_channels,
                "num_res_blocks": vision.res_blocks,
                "norm_scope": vision.norm_scope,
                "encoder_kernel": vision.encoder_kernel,
                "middle": vision.middle,
            },
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
