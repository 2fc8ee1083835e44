"""A model's folder: ``config.json``, weights and ``tokenizer.json``.

Read in the layout in which Janus-Pro and FAiD are published and in that of the ``transformers`` library; written in
the former (see ``config_json`` for the keys of our own, ``layouts`` for the names of tensors).
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, sample_hash, write_json
from arrag_jax.forks import require_own_process
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.config_json import (
    config_to_json,
    layout_of,
    parse_config,
    read_json,
    read_lora,
    require_language,
)
from arrag_jax.models.janus import PARTS, VISION, Janus
from arrag_jax.models.layouts import Layout
from arrag_jax.models.manifest import WEIGHTS, require_weights_written
from arrag_jax.models.presets import JanusConfig
from arrag_jax.models.tensor_files import Stored, checkpoint_folder, has_checksums, stored_tensors
from arrag_jax.models.weights import DTYPES, match, parameters, read_weights, write_weights


def load_model(
    directory: str | Path, dtype: str = "float32", parts: tuple[str, ...] = PARTS, grid: ArrayLike = None
) -> Janus:
    """Reads a checkpoint folder.

    Args:
      directory: holds config.json and the weights: safetensors or PyTorch's .bin, in one file or several with an
        index. A LoRA adapter beside them is kept apart in the model, as ``Attention.q_lora`` and ``v_lora``.
        A training run's --workdir stands for the export in it.
      dtype: of the parameters: float32, bfloat16 or float16; the tokenizer stays in float32.
      parts: the parts to read, e.g. ``VISION`` for the tokenizer alone; the others are None.
      grid: height and width in codes of the pictures to be drawn; None = the config's, and where it is silent, as
        published ones are, that of its image size, else 24 x 24. ``Janus.with_grid`` changes it later.

    Raises:
      UserError: the folder, its config or its weights are not a Janus; the message names what is wrong.
    """
    require_own_process()
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    directory = checkpoint_folder(Path(directory))
    model, layout, stored = abstract_model(directory, parts)
    if not has_checksums(directory / WEIGHTS) and set(parts) == set(PARTS):
        require_weights_written(directory)  # an export from before tensors had their own
    model = model if grid is None else model.with_grid(grid)
    read_weights(model, match(model, stored, layout, directory), dtype)
    if model.gen_vision_model is not None:
        size, dim = model.config.vision.codebook_size, model.config.vision.code_dim
        model.gen_vision_model.usage.set_value(jnp.full((size,), 1.0 / size))
        model.gen_vision_model.spare.set_value(jnp.zeros((size, dim)))
    return model


def abstract_model(
    directory: Path, parts: tuple[str, ...] | None = PARTS, also: tuple[str, ...] = ()
) -> tuple[Janus, Layout, dict[str, Stored]]:
    """The model that a folder's configs describe, shapes without numbers; how its tensors are named there; and these.

    Args:
      parts: the parts to build; None = all that the folder holds, which may be the tokenizer alone.
      also: further files to look for tensors in.

    Raises:
      UserError: configs of another model, or of one with more layers than the folder has tensors; or the folder holds
        the tokenizer alone and another part is asked for.
    """
    config, lora = read_json(directory), read_lora(directory)
    shape = parse_config(config, directory)
    if parts is None:
        parts = PARTS if shape.draws else VISION
    if set(parts) - set(VISION):
        require_language(shape, directory)
    if shape.draws and shape.pad_id >= shape.language.vocab_size:
        raise UserError(
            f"{directory} has a vocabulary of {shape.language.vocab_size}, but its pad token is {shape.pad_id}"
        )
    stored = stored_tensors(directory, also)
    _require_room(shape, stored, parts, directory / "config.json")

    def build() -> Janus:
        model = Janus(shape, nnx.Rngs(0), parts)
        for layer in model.language_model.layers if lora and model.language_model else ():
            layer.attention.add_lora(lora, nnx.Rngs(0))
        return model

    return nnx.eval_shape(build), layout_of(config), stored


def _require_room(shape: JanusConfig, stored: dict[str, Stored], parts: tuple[str, ...], path: Path) -> None:
    """Raises UserError where a config asks for more than the weights beside it hold, before modules are built for it.

    It counts what is surely there: each layer or block has a tensor of its own, and a layer its seven matrices.
    """
    text, vision, layers, width, blocks, depth, numbers = shape.language, shape.vision, 0, 0, 0, 0, 0
    if "language_model" in parts:
        layers, width, numbers = text.layers, text.width, text.layers * 3 * text.width * text.mlp
    if "gen_vision_model" in parts:
        blocks = len(vision.multipliers) * vision.res_blocks
        numbers += blocks * vision.channels**2
    if "gen_aligner" in parts:
        depth = shape.aligner_depth
        numbers += depth * text.width
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if layers + blocks + depth > len(stored) or numbers > held:
        raise UserError(
            f"{path} asks for {layers} layers of width {width}, {blocks} blocks of the tokenizer and an aligner "
            f"of {depth}, more than the {len(stored)} tensors of {held:,} numbers beside it; copy the checkpoint again"
        )


def save_model(model: Janus, directory: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors; the config comes last, so a killed save is no checkpoint.

    Raises:
      UserError: the model's LoRA is apart; merge it first.
    """
    if any("_lora." in path for path in parameters(model)):
        raise UserError("this model's LoRA is apart; merge it (Attention.merge_lora of every layer), then save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    with atomic_write(directory / "model.safetensors") as temporary:
        write_weights(model, temporary, dtype)
    shape = model.config if model.language_model is not None else dataclasses.replace(model.config, language=None)
    write_json(directory / "config.json", config_to_json(shape))


def sample_hashes(directory: str | Path) -> dict[str, str]:
    """``files.sample_hash`` of each of ``files_of``, by name.

    Raises:
      UserError: this is no checkpoint folder.
    """
    return {f"{directory}/{path.name}": sample_hash(path) for path in files_of(directory)}


def files_of(directory: str | Path) -> list[Path]:
    """The files that ``load_model`` and the text tokenizer read, in order; errors as ``sample_hashes``."""
    folder = checkpoint_folder(Path(directory))
    files = {tensor.file for tensor in stored_tensors(folder).values()}
    return sorted(files | {path for path in folder.glob("*.json") if path.is_file()})


def tokenizer_fingerprint(model: Janus) -> str:
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
