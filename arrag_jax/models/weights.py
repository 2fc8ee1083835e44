"""Weights in the layout in which Janus checkpoints are published, read and written strictly.

One table turns the path of each of our parameters into its published key. Our own checkpoints use the
same layout, so there is one reader and one writer. Every missing, unknown and mis-shaped key is
reported at once.
"""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from arrag_jax.errors import UserError
from arrag_jax.models.janus import PARTS, VISION
from arrag_jax.nn.vq import CodeUsage

_LAYER = r"language_model\.layers\.(\d+)\."
# Our path → published key, first match wins. The leaf (kernel, scale, embedding) becomes "weight".
_RENAMES: tuple[tuple[str, str], ...] = (
    (rf"{_LAYER}attention\.([qkvo])\.", r"language_model.model.layers.\1.self_attn.\2_proj."),
    (rf"{_LAYER}mlp\.(\w+)\.", r"language_model.model.layers.\1.mlp.\2_proj."),
    (rf"{_LAYER}input_norm\.", r"language_model.model.layers.\1.input_layernorm."),
    (rf"{_LAYER}mlp_norm\.", r"language_model.model.layers.\1.post_attention_layernorm."),
    (rf"{_LAYER}blender\.norm_scale$", r"language_model.model.layers.\1.retrieval_layernorm.weight"),
    (rf"{_LAYER}blender\.gate\.0\.", r"language_model.model.layers.\1.blender.mlp.0."),
    (rf"{_LAYER}blender\.gate\.1\.", r"language_model.model.layers.\1.blender.mlp.2."),
    (rf"{_LAYER}blender\.", r"language_model.model.layers.\1.blender."),
    (r"language_model\.(embed_tokens|norm)\.", r"language_model.model.\1."),
    (r"gen_aligner\.layers\.1\.", r"gen_aligner.layers.2."),  # the published list counts the GELU
    (r"gen_head\.layers\.0\.", r"gen_head.output_mlp_projector."),
    (r"gen_head\.layers\.1\.", r"gen_head.vision_head."),
    (r"(gen_vision_model\..*\.(?:up|down)sample)\.", r"\1.conv."),
    (r"gen_vision_model\.codes$", r"gen_vision_model.quantize.embedding.weight"),
)

# Published keys that drawing never needs: the text head, a training counter, the understanding tower.
_LEFT_OUT = re.compile(
    r"language_model\.lm_head\.weight|gen_vision_model\.quantize\.codebook_used|(vision_model|aligner)\..*"
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def published_key(path: str) -> str:
    """The published key of one of our parameters."""
    key = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)
    for pattern, replacement in _RENAMES:
        key, count = re.subn("^" + pattern, replacement, key)
        if count:
            break
    return key


def to_ours(value: np.ndarray, path: str) -> np.ndarray:
    """A published tensor in our axis order: [out, in] → [in, out], OIHW → HWIO."""
    if not path.endswith(".kernel"):
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def to_published(value: np.ndarray, path: str) -> np.ndarray:
    """The inverse of ``to_ours``."""
    if not path.endswith(".kernel"):
        return np.ascontiguousarray(value)
    return np.ascontiguousarray(value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1))


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """A model's parameters by dotted path, bookkeeping of training left out."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): value for path, value in flat if not isinstance(value, CodeUsage)}


def tensor_files(directory: Path) -> dict[str, Path]:
    """Which safetensors file holds which published key.

    Raises:
      UserError: no weights, a truncated file, or an index that does not match its files.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    listed: dict[str, str] = {}
    if index.is_file():
        try:
            listed = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a safetensors index; copy the checkpoint again") from error
    elif not single.is_file():
        raise UserError(f"{directory} holds no model.safetensors; give the folder of a Janus checkpoint")
    held = {}
    for name in sorted(set(listed.values())) or [single.name]:
        with _open(directory / name) as file:
            held.update(dict.fromkeys(file.keys(), directory / name))
    wrong = sorted(key for key, name in listed.items() if held.get(key) != directory / name)
    if wrong:
        raise UserError(f"{index} names tensors that its files do not hold: {_some(wrong)}; copy the checkpoint again")
    return held


def read_weights(model: nnx.Module, directory: Path, dtype: str) -> None:
    """Fills a model with a directory's weights, tensor by tensor.

    Args:
      model: built abstractly (``nnx.eval_shape``), with all its parts or some; receives its
        parameters in ``dtype``, those of the tokenizer in float32
        (see ``write_weights``). Keys of a published part that it was built without are passed over.

    Raises:
      UserError: with every missing, unknown and mis-shaped key.
    """
    wanted = {published_key(path): (path, value) for path, value in parameters(model).items()}
    files = tensor_files(directory)
    problems = [f"missing {key}" for key in sorted(set(wanted) - set(files))]
    absent = tuple(f"{part}." for part in PARTS if getattr(model, part) is None)
    problems += [
        f"unknown {key}"
        for key in sorted(set(files) - set(wanted))
        if not _LEFT_OUT.fullmatch(key) and not key.startswith(absent)
    ]
    for key in sorted(set(wanted) & set(files)):
        path, value = wanted[key]
        with _open(files[key]) as file:
            shape = tuple(file.get_slice(key).get_shape())
        expected = to_published(np.empty(value.shape, np.bool_), path).shape
        if shape != expected:
            problems.append(f"{key} has shape {shape}, its config asks for {expected}")
    if problems:
        raise UserError(f"{directory} does not hold the model of its config.json: {_some(problems)}")
    for file_path in sorted(set(files.values())):
        with _open(file_path) as file:
            for key in sorted(set(wanted) & set(file.keys())):
                path, value = wanted[key]
                value.set_value(jnp.asarray(to_ours(file.get_tensor(key), path), _kept(path, dtype)))


def write_weights(model: nnx.Module, path: Path, dtype: str) -> None:
    """Writes a model's parameters under their published keys to one file.

    The tokenizer stays in float32 whatever the ``dtype``: a rounded tokenizer gives some images other codes, and no
    datastore built before would fit it.
    """
    tensors = {}
    for name, value in parameters(model).items():
        tensors[published_key(name)] = to_published(np.asarray(value[...].astype(_kept(name, dtype))), name)
    save_file(tensors, path, metadata={"format": "pt"})


def _kept(path: str, dtype: str):
    """The dtype in which a parameter is held."""
    return DTYPES["float32" if path.startswith(VISION) else dtype]


def _open(path: Path):
    """A safetensors file, or a UserError that names it."""
    if not path.is_file():
        raise UserError(f"{path} is named by its index but is not there; copy the checkpoint again")
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy the checkpoint again") from error


def _some(items: list[str], limit: int = 12) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
