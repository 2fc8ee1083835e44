"""Reads a CLIP from the folder in which it is published: config.json, safetensors and tokenizer.json."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike
from arrag_jax.json_files import read_object
from arrag_jax.models.layouts import Layout
from arrag_jax.models.schema import MOST_LAYERS, MOST_WIDTH
from arrag_jax.models.tensor_files import checkpoint_folder, stored_tensors
from arrag_jax.models.weights import match, read_weights
from arrag_jax.nn.clip import Clip, ClipConfig, TowerConfig
from arrag_jax.parsing import in_range, parse, shown

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
LAYOUT = Layout(
    names=(),
    rules=(),
    parts={name: name for name in ("vision_model", "text_model", "visual_projection", "text_projection")},
    unused=re.compile(r"(vision|text)_model\.embeddings\.position_ids"),
    exact=(),
)


@dataclasses.dataclass(frozen=True)
class TowerSection:
    """``vision_config`` or ``text_config``; a key that is left out has another default in each."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"):
            value = getattr(self, name)
            if value is not None:
                in_range(name, value, 1, MOST_WIDTH)
        in_range("num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        in_range("vocab_size", self.vocab_size, 1, 2**24)
        in_range("max_position_embeddings", self.max_position_embeddings, 1, 2**16)
        if self.image_size % self.patch_size:
            raise UserError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")

    def tower(self, default: TowerConfig) -> TowerConfig:
        """Returns the tower's shape."""
        return TowerConfig(
            self.hidden_size or default.width,
            self.intermediate_size or default.mlp,
            self.num_hidden_layers,
            self.num_attention_heads or default.heads,
            self.hidden_act,
            self.layer_norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class ClipFile:
    """``config.json``. Older files repeat the sections in ``…_config_dict``, whose keys come first."""

    vision_config: TowerSection = TowerSection()
    text_config: TowerSection = TowerSection()
    projection_dim: int = 512

    def __post_init__(self):
        in_range("projection_dim", self.projection_dim, 1, MOST_WIDTH)


def read_clip_config(directory: Path) -> ClipConfig:
    """Returns the shape of the CLIP in a folder.

    Raises:
      UserError: if there is no config.json, or it does not describe a CLIP.
    """
    path = directory / "config.json"
    content = read_object(path)
    if content.get("model_type") != "clip":
        raise UserError(f"{path} describes no CLIP: its model_type is {shown(content.get('model_type'))}")
    merged: dict[str, Any] = {"projection_dim": content.get("projection_dim", 512)}
    for section in ("vision_config", "text_config"):
        merged[section] = {**(content.get(section) or {}), **(content.get(f"{section}_dict") or {})}
    held = parse(ClipFile, merged, str(path), ignore_unknown=True)
    default, vision, text = ClipConfig(), held.vision_config, held.text_config
    return ClipConfig(
        vision.tower(default.vision),
        text.tower(default.text),
        held.projection_dim,
        vision.image_size,
        vision.patch_size,
        text.vocab_size,
        text.max_position_embeddings,
        text.eos_token_id,
    )


def load_clip(directory: str | Path) -> Clip:
    """Returns the CLIP in a folder, in float32.

    Raises:
      UserError: if the folder does not hold one; the message lists every missing, unknown and mis-shaped tensor.
    """
    folder = checkpoint_folder(Path(directory))
    config = read_clip_config(folder)
    stored = stored_tensors(folder)
    if config.vision.layers + config.text.layers > len(stored):
        raise UserError(f"{folder}/config.json asks for more layers than the {len(stored)} tensors beside it")
    model = nnx.eval_shape(lambda: Clip(config, nnx.Rngs(0)))
    read_weights(model, match(model, stored, LAYOUT, folder), "float32", LAYOUT.exact)
    return model


class ClipTokenizer:
    """Turns texts into the tokens of CLIP's text tower.

    Args:
      directory: the folder that holds tokenizer.json.
      config: of the CLIP in it.

    Raises:
      UserError: if tokenizer.json is missing or damaged, or has ids outside the text tower's vocabulary.
    """

    def __init__(self, directory: Path, config: ClipConfig):
        path = directory / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(
                f"{path} cannot be read as a tokenizer ({shown(str(error))}); copy the CLIP again"
            ) from error
        if self._tokenizer.get_vocab_size() > config.vocab_size:
            raise UserError(
                f"{path} has more tokens than the {config.vocab_size:,} of config.json; copy the CLIP again"
            )
        end = self._tokenizer.encode("").ids[-1:]
        if not end:
            raise UserError(f"{path} adds no end-of-text token; copy the CLIP again")
        self._tokenizer.enable_truncation(config.length)
        self._tokenizer.enable_padding(length=config.length, pad_id=end[0])

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Returns the tokens of texts; longer ones are cut, shorter ones padded with end-of-text tokens."""
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], np.int32)


def clip_pixels(image: ArrayLike, side: int, crop_first: bool = False) -> Float32[np.ndarray, "side side 3"]:
    """Returns an image as CLIP's image tower takes it: scaled by PIL's bicubic filter, cropped and normalised.

    Args:
      image: RGB pixels, uint8 [h, w, 3].
      crop_first: crop the centre square, then scale it, as for CMMD. Otherwise, as CLIP itself does, the shorter side
        is scaled and then the centre cropped.
    """
    pixels: UInt8[np.ndarray, "h w 3"] = np.asarray(image)
    picture = Image.fromarray(pixels)
    height, width = pixels.shape[:2]
    if crop_first:
        short = min(height, width)
        picture = _centre(picture, short, (width - short) // 2, (height - short) // 2)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    else:
        wide, high = (side, side * height // width) if width <= height else (side * width // height, side)
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        picture = _centre(picture, side, round((wide - side) / 2), round((high - side) / 2))
    return (np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION


def _centre(picture: Image.Image, side: int, left: int, top: int) -> Image.Image:
    return picture.crop((left, top, left + side, top + side))


@nnx.jit
def unit_image_features(model: Clip, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B C"]:
    """Returns the vectors of prepared images, of length 1."""
    with jax.default_matmul_precision("highest"):
        return _unit(model.image_features(pixels))


@nnx.jit
def unit_text_features(model: Clip, ids: Int[Array, "B L"]) -> Float[Array, "B C"]:
    """Returns the vectors of tokenized texts, of length 1."""
    with jax.default_matmul_precision("highest"):
        return _unit(model.text_features(ids))


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
    return x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True)
