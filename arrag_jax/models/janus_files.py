"""Reads and writes the folder of a Janus: ``config.json``, the weights and ``tokenizer.json``.

It reads the layout in which Janus-Pro and FAiD are published, and the layout of the ``transformers`` library. It writes
the published layout. ``config_json`` describes our additional keys, ``layouts`` the names of the tensors.
"""

import dataclasses
import math
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.config_json import (
    config_to_json,
    layout_of,
    parse_config,
    read_config,
    read_json,
    read_lora,
    require_language,
)
from arrag_jax.models.family import Family, Training
from arrag_jax.models.folder import filled, require_room, write_folder
from arrag_jax.models.janus import PARTS, VISION, Janus
from arrag_jax.models.layouts import PUBLISHED, Layout
from arrag_jax.models.manifest import WEIGHTS, require_weights_written
from arrag_jax.models.presets import PRESETS, JanusConfig
from arrag_jax.models.tensor_files import Stored, has_checksums, stored_tensors
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.models.vq_images import VQImages
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.variables import freeze


def _load(
    directory: Path,
    dtype: str,
    grid: ArrayLike,
    mesh: Mesh | None = None,
    int8: bool = False,
    parts: tuple[str, ...] = PARTS,
) -> Janus:
    """Returns the model in a folder with the named parts; the other parts are None."""
    model, layout, stored = abstract_model(directory, parts)
    if not has_checksums(directory / WEIGHTS) and set(parts) == set(PARTS):
        require_weights_written(directory)  # older exports have no checksums per tensor
    return filled(model, layout, stored, directory, dtype, grid, mesh, int8)


def abstract_model(
    directory: Path, parts: tuple[str, ...] | None = PARTS, also: tuple[str, ...] = ()
) -> tuple[Janus, Layout, dict[str, Stored]]:
    """Returns the abstract model of a folder (shapes without numbers), its layout, and its tensors by key.

    Args:
      parts: the parts to build; None = all parts that the folder holds, which may be the tokenizer alone.
      also: further files to look for tensors in.

    Raises:
      UserError: if the configs describe another kind of model or a larger model than the tensors hold, or if the folder
        holds the tokenizer alone and another part is requested.
    """
    config, lora = read_json(directory), read_lora(directory)
    shape = parse_config(config, directory)
    if parts is None:
        parts = PARTS if shape.draws else VISION
    if set(parts) - set(VISION):
        require_language(shape, directory)
    if shape.draws and shape.pad_id >= shape.decoder.vocab_size:
        raise UserError(
            f"{directory} has a vocabulary of {shape.decoder.vocab_size}, but its pad token is {shape.pad_id}"
        )
    stored = stored_tensors(directory, also)
    aligner = shape.aligner_depth if "gen_aligner" in parts else 0
    require_room(shape, stored, parts, directory / "config.json", aligner)

    return abstract(_build, shape=shape, parts=parts, lora=lora), layout_of(config), stored


def _build(shape: JanusConfig, parts: tuple[str, ...], lora: LoraConfig | None, rngs: nnx.Rngs) -> Janus:
    model = Janus(shape, rngs, parts)
    if lora and model.language_model:
        for layer in model.language_model.layers:
            layer.attention.add_lora(lora, rngs)
    return model


def _save(model: Janus, directory: Path, dtype: str) -> None:
    shape = model.config if model.language_model is not None else dataclasses.replace(model.config, language=None)
    write_folder(model, directory, dtype, PUBLISHED, config_to_json(shape))


def _fresh_prior(
    preset: JanusConfig, tokenizer: VQImages, text: PromptTokenizer, prompt_length: int, rngs: nnx.Rngs
) -> Janus:
    """Returns an untrained Janus with a frozen tokenizer; its code embedding is initialised with the codebook.

    Raises:
      UserError: if the tokenizer does not have the shape of the preset.
    """
    if tokenizer.vq.config != preset.vision:
        raise UserError(
            f"it is {tokenizer.vq.config}, the preset is {preset.vision}; choose the preset that it was trained with"
        )
    language = dataclasses.replace(preset.decoder, vocab_size=text.vocab_size)
    longest = prompt_length + math.prod(preset.grid)
    shape = dataclasses.replace(preset, language=language, pad_id=text.pad_id, max_positions=longest)
    model = Janus(shape, rngs)
    model.gen_vision_model = tokenizer.vq
    freeze(model.gen_vision_model)
    model.gen_embed.embedding[...] = tokenizer.codebook
    return model


JANUS = Family(
    model_types=("multi_modality", "janus"),
    kind=Janus,
    recognises=lambda config: "gen_vision_config" in config,
    read_config=read_config,
    load=_load,
    load_tokenizer=lambda directory: _load(directory, "float32", None, parts=VISION),
    save=_save,
    prompts=PromptTokenizer.load,
    open=lambda directory, also: abstract_model(directory, None, also),
    layout_of=layout_of,
    layouts={"ours": PUBLISHED, "janus": PUBLISHED},
    to_json=config_to_json,
    presets=PRESETS,
    training=Training(lambda preset, rngs: Janus(preset, rngs, VISION), PromptTokenizer.of_words, _fresh_prior),
)
