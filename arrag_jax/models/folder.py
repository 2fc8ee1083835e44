"""Steps that reading and writing a model's folder have in common in all families."""

import math
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, write_json
from arrag_jax.interfaces import ArrayLike
from arrag_jax.models.layouts import Layout
from arrag_jax.models.llama_backbone import LlamaBackbone
from arrag_jax.models.shape import ModelShape
from arrag_jax.models.tensor_files import Stored
from arrag_jax.models.weights import match, parameters, read_weights, write_weights

Model = TypeVar("Model", bound=LlamaBackbone)


def require_room(
    shape: ModelShape, stored: dict[str, Stored], parts: tuple[str, ...], path: Path, aligner: int | None = None
) -> None:
    """Raises UserError if a config describes a larger model than the weights hold; called before modules are built.

    It compares lower bounds: each layer or block has at least one tensor, and each layer at least its MLP matrices.

    Args:
      shape: what the config describes.
      stored: the tensors.
      parts: names of the parts that will be built.
      path: of the config, for the message.
      aligner: number of layers between codes and decoder, of the decoder's width; None = the family has none.
    """
    layers, width, blocks, numbers = 0, 0, 0, 0
    if "language_model" in parts:
        text = shape.decoder
        layers, width, numbers = text.layers, text.width, text.layers * 3 * text.width * text.mlp
    if "gen_vision_model" in parts:
        blocks = len(shape.vision.multipliers) * shape.vision.res_blocks
        numbers += blocks * shape.vision.channels**2
    if aligner:
        numbers += aligner * shape.decoder.width
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if layers + blocks + (aligner or 0) > len(stored) or numbers > held:
        further = "" if aligner is None else f" and an aligner of {aligner}"
        joined = " and" if aligner is None else ","
        raise UserError(
            f"{path} asks for {layers} layers of width {width}{joined} {blocks} blocks of the tokenizer{further}, "
            f"more than the {len(stored)} tensors of {held:,} numbers beside it; copy the checkpoint again"
        )


def filled(
    model: Model,
    layout: Layout,
    stored: dict[str, Stored],
    directory: Path,
    dtype: str,
    grid: ArrayLike,
    mesh: Mesh | None = None,
    int8: bool = False,
) -> Model:
    """Returns an abstract model over a grid (None = its own) with the weights of its folder, laid out over a mesh.

    With ``int8``, the decoder holds its linear layers in int8.

    Raises:
      UserError: as ``weights.match`` and ``weights.read_weights``.
    """
    model = model if grid is None else model.with_grid(grid)
    matched = match(model, stored, layout, directory)
    if int8:
        model.language_model.hold_in_int8()
    read_weights(model, matched, dtype, layout.exact, mesh)
    return model


def require_no_int8(model: Any, what: str) -> None:
    """Raises UserError if a model holds weights in int8; ``what`` says what is not done with them."""
    if any(value.dtype == jnp.int8 for value in parameters(model).values()):
        raise UserError(f"weights in int8 can only draw and score, they are not {what}; load the model without int8")


def write_folder(model: LlamaBackbone, directory: Path, dtype: str, layout: Layout, config: dict[str, Any]) -> None:
    """Writes weights and ``config.json``; the config comes last, so that a killed save leaves no checkpoint.

    Raises:
      UserError: if the model's LoRA is not merged, or its weights are held in int8.
    """
    require_no_int8(model, "saved")
    if any("_lora." in path for path in parameters(model)):
        raise UserError("this model's LoRA is not merged; merge it first (merge_lora), then save")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    with atomic_write(directory / "model.safetensors") as temporary:
        write_weights(model, temporary, dtype, layout)
    write_json(directory / "config.json", config)
