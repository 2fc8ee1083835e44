"""Folders of scenes, two of them bad, and the tiny tokenizer that tests make stores of them with."""

from pathlib import Path

import numpy as np
from PIL import Image

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig
from arrag_jax.data import pixels
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.models.checkpoint import load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.nn.vq import from_uint8
from arrag_jax.store.datastore import Datastore
from helpers import tiny

BAD = {"scene_05.png": b"", "scene_11.png": b"no image"}


def write_scenes(folder: Path, numbers: range) -> Path:
    """A folder of scenes as PNG files, of which two are bad."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        Image.fromarray(render(scene("store", number))).save(folder / f"scene_{number:02d}.png")
    for name in BAD.keys() & {path.name for path in folder.iterdir()}:
        (folder / name).write_bytes(BAD[name])
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def config(folder: Path) -> DatastoreConfig:
    """A store of 23 scenes by a tokenizer of 8 x 10 pixels; both are made in the folder."""
    save_model(tiny.janus(parts=VISION), folder / "model")
    write_scenes(folder / "photos", range(23))
    return config_in(folder)


def config_in(folder: Path) -> DatastoreConfig:
    """The same, of a model and scenes that are there."""
    model, source = (str(folder / name) for name in ("model", "photos"))
    return DatastoreConfig(model, source, batch_size=4, shard_size=5, max_bad_fraction=0.1, indexes=())


def built(config: DatastoreConfig, directory: Path) -> Datastore:
    """The store that the command makes of a config."""
    build_datastore.run(config, str(directory))
    return Datastore.open(directory)


def codes_of(model: str, folder: Path, names: list[str]) -> np.ndarray:
    """The codes of these files by the model itself, one by one."""
    tokenizer = load_tokenizer(model)
    found = []
    for name in names:
        image = pixels.decode((folder / name).read_bytes(), tokenizer.image_size)
        found.append(np.asarray(tokenizer.encode_images(from_uint8(image[None]))[0]).reshape(tokenizer.grid))
    return np.stack(found)
