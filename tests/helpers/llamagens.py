"""LlamaGens that several tests share: folders of the golden ones, and a tiny random one with FAiD's blenders."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.models.llamagen import PARTS, LlamaGen
from arrag_jax.models.llamagen_config import LlamaGenConfig
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from helpers import tiny
from helpers.golden import find

SHAPE = LlamaConfig(9, width=16, layers=2, heads=4, kv_heads=2, mlp=24, rotary="positions", joined=True)
CONFIG = LlamaGenConfig(
    language=SHAPE,
    vision=VQConfig(codebook_size=9, channels=4, multipliers=(1, 2), z_channels=8, res_blocks=1, norm_groups=2),
    grid=(4, 5),
    classes=6,
    caption_width=7,
    faid=FaidConfig(stride=1, hops=(1, 2), neighbors=3),
)


def golden() -> dict[str, Any]:
    """The config of the golden set."""
    return json.loads(path("config.json").read_text())


def path(name: str) -> Path:
    """Where a file of the golden set lies; skips where it is absent."""
    return find("llamagen", name)


def arrays(name: str) -> dict[str, np.ndarray]:
    """Golden arrays of a model."""
    with np.load(path(f"{name}.npz")) as content:
        return dict(content)


def folder(target: Path, name: str, weights: str, tokenizer: str = "") -> Path:
    """A folder as a user makes it: golden hyper-parameters, published weights, and a tokenizer's where asked for."""
    given = golden()
    target.mkdir(parents=True, exist_ok=True)
    model = given["models"][name]
    config = {**model, "model_type": "llamagen", "family": model["model_type"]}
    shutil.copyfile(path(weights), target / ("model.safetensors" if weights.endswith(".safetensors") else weights))
    if tokenizer:
        config["vq"] = given["vq"][Path(tokenizer).stem]
        shutil.copyfile(path(tokenizer), target / f"vq{Path(tokenizer).suffix}")
    (target / "config.json").write_text(json.dumps(config))
    return target


def random(family: str, seed: int = 0) -> LlamaGen:
    """A random model with blenders, whose logits differ enough between codes for draws to mean something."""
    config = dataclasses.replace(CONFIG, family=family, caption_tokens=8 if family == "t2i" else CONFIG.caption_tokens)
    model = abstract(LlamaGen, config=config, parts=PARTS)
    tiny.fill(model, seed)
    model.gen_head.weight[...] = 3.0 * model.gen_head.weight[...]
    return model


def condition(family: str, rows: int = 3, seed: int = 0) -> Any:
    """Classes, or features of captions of several lengths, padded on the left."""
    rng = np.random.default_rng(seed)
    if family == "c2i":
        return rng.integers(0, CONFIG.classes, rows).astype(np.int32)
    mask = np.arange(6)[None] >= 6 - rng.integers(1, 7, rows)[:, None]
    features = rng.normal(size=(rows, 6, CONFIG.caption_width)).astype(np.float32)
    return np.where(mask[..., None], features, 0), mask
