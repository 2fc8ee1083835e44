"""Small stores and configs for the embedded model, prompts that it can draw, and folders told apart by their bytes."""

import dataclasses
import hashlib
from pathlib import Path

from arrag_jax import build_datastore
from arrag_jax.config import (
    DaidConfig,
    DataSetConfig,
    DatastoreConfig,
    DrawConfig,
    MeshConfig,
    RetrievalConfig,
    SamplingConfig,
)

MODEL = str(Path(__file__).resolve().parents[2] / "arrag_jax" / "assets" / "emoji_janus")
PROMPTS = ["a cat", "two dogs", "three cats", "a dog"]


def make_store(tmp_path_factory) -> str:
    """A store of 24 scenes with a ScaNN index."""
    data, store = (str(tmp_path_factory.mktemp(name)) for name in ("data", "store"))
    config = DatastoreConfig(MODEL, "emoji_scenes/tiny", data_dir=data, num_images=24, captions=True)
    build_datastore.run(config, workdir=store)
    return store


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by its SHA-256."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_config(tmp_path_factory) -> DrawConfig:
    """Returns a config of the embedded checkpoint with a store of 48 scenes."""
    data = str(tmp_path_factory.mktemp("data"))
    store = str(tmp_path_factory.mktemp("store"))
    build_datastore.run(
        DatastoreConfig(model=MODEL, source="emoji_scenes/tiny", data_dir=data, num_images=48, captions=True),
        workdir=store,
    )
    return DrawConfig(
        model=MODEL,
        retrieval=RetrievalConfig(store=store, k=16),
        daid=DaidConfig(weight=0.3),
        sampling=SamplingConfig(cfg_scale=2.0),
        data=DataSetConfig(source="emoji_scenes/tiny", data_dir=data),
        mesh=MeshConfig(1, 1),
        batch_size=4,
    )


def changed(config: DrawConfig, where: str, **fields) -> DrawConfig:
    """Returns a config with other values in one section."""
    return dataclasses.replace(config, **{where: dataclasses.replace(getattr(config, where), **fields)})
