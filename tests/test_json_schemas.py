"""JSON from outside, mutated field by field: it loads as before, or is one line that names the file. Never more.

Hashes are made anew after each mutation, so that it is the schemas that are tried.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.config_json import read_config, read_lora
from arrag_jax.models.manifest import write_manifest as write_export_manifest
from arrag_jax.models.tensor_files import stored_tensors
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval import index
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE
from arrag_jax.store import building, segments, writer
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings
from arrag_jax.training.checkpoint import require_base
from arrag_jax.training.metrics import training_minutes
from arrag_jax.training.shared import made_by
from arrag_jax.training.sums import read_sums
from helpers import stored, tiny
from helpers.mutations import assert_told, mutations

NUMBER = 500


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with captions, a part, and an index."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    whole = stored.build(folder, [f"image {i}" for i in range(12)], kept=True)
    stored.build(segments.next_segment(whole), [f"more {i}" for i in range(5)], kept=True)
    index.build_index(segments.add_segment(whole, segments.next_segment(whole)), "codebook", EXHAUSTIVE)
    return folder


@pytest.fixture
def signed(monkeypatch):
    """Hashes of manifests and records are what these say."""
    monkeypatch.setattr("arrag_jax.store.shards.content_hash", lambda content: content.get("sha256", "0"))
    monkeypatch.setattr("arrag_jax.retrieval.index.content_hash", lambda content: content.get("sha256", "0"))


def of_store(folder: Path) -> tuple:
    """All that a store gives."""
    found = Datastore.open(folder)
    found.require_tokenizer("f")
    found.require_manifest()
    arrays = [found.codes.tobytes(), found.codebook.tobytes(), found.records("latents").tobytes()]
    return found.num_images, found.settings.grid, arrays, found.sources, found.captions, found.bad


@pytest.mark.slow
def test_a_stores_manifest(store, signed):
    path, whole = store / "manifest.json", of_store(store)
    text = path.read_text()
    document = json.loads(text)
    path.write_text(json.dumps({key: value for key, value in document.items() if key != "parts"}))
    alone = of_store(store)  # a store that has never been added to is one as well
    path.write_text(text)
    loaded, refused = assert_told(path, mutations(document, NUMBER), lambda: of_store(store), whole, alone)
    assert loaded and refused > NUMBER / 2  # both ways are gone


@pytest.mark.slow
def test_the_manifest_of_a_part(store, signed, monkeypatch):
    """Its hash in the whole store's manifest is made anew as well."""
    whole, path = of_store(store), store / "part-00001" / "manifest.json"
    monkeypatch.setattr(
        Datastore, "store_fingerprint", json.loads((store / "manifest.json").read_text())["parts"][path.parent.name]
    )
    assert_told(path, mutations(json.loads(path.read_text()), NUMBER, 1), lambda: of_store(store), whole)


@pytest.mark.slow
def test_an_index_record(store, signed):
    context = np.random.default_rng(0).integers(0, stored.CODES, (9, 4)).astype(np.int32)

    def load() -> list[bytes]:
        host = index.load_index(Datastore.open(store), "codebook", 5, EXHAUSTIVE)
        return [np.asarray(x).tobytes() for x in host.search(context, np.int32(0))]

    path = store / "index-codebook" / "index.json"
    assert_told(path, mutations(json.loads(path.read_text()), NUMBER), load, load())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Janus with an adapter, a tokenizer, a generation config, an index of two files, and a manifest."""
    folder, rng = tmp_path_factory.mktemp("checkpoint"), np.random.default_rng(0)
    text = PromptTokenizer.of_words(["a cat"])
    save_model(tiny.janus(), folder)
    write_export_manifest(folder, {"tokenizer_fingerprint": "f", "figures": {"psnr_db": 1.0}, "command": "train"})
    text.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 1, "eos_token_id": 2}))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_dora": False}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config": {"params": {"image_size": 8}}, "torch_dtype": "float32"}
    config["language_config"] |= {"rope_scaling": {"rope_type": "default"}, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    adapter = {}
    for i in range(tiny.CONFIG.language.layers):
        for name, width in (("q", 16), ("v", 8)):
            key = f"base_model.model.language_model.model.layers.{i}.self_attn.{name}_proj.lora_"
            adapter |= {f"{key}A.weight": rng.normal(size=(2, 16)), f"{key}B.weight": rng.normal(size=(width, 2))}
    save_file({key: value.astype(np.float32) for key, value in adapter.items()}, folder / "adapter_model.safetensors")
    return folder


def load_whole(folder: Path, known: set) -> None:
    """A model, once a shape: to build one takes longer than to read a config."""
    config, lora = read_config(folder), read_lora(folder)
    language = dataclasses.replace(config.language, rope_theta=1.0, norm_eps=0.1)
    plain = dataclasses.replace(
        config, language=language, pad_id=min(config.pad_id, 12), max_positions=None, grid=(1, 1)
    )
    shape = plain, lora and lora.rank
    if shape not in known:
        known.add(shape)
        load_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "generation_config.json"])
def test_a_models_config(checkpoint, name, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    if name == "generation_config.json":
        del config["language_config"]["pad_token_id"]
        (folder / "config.json").write_text(json.dumps(config))
    known = set()
    load_whole(folder, known)
    loaded, refused = assert_told(
        folder / name, mutations(json.loads((folder / name).read_text()), NUMBER), lambda: load_whole(folder, known)
    )
    assert loaded and refused


@pytest.mark.slow
def test_a_config_of_transformers(tmp_path):
    config = {
        "model_type": "janus",
        "text_config": {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "intermediate_size": 24, "pad_token_id": 1, "rope_parameters": {"rope_theta": 1e4}},
        "vq_config": {"num_embeddings": 9, "embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 2],
                      "latent_channels": 8, "num_res_blocks": 1, "num_hidden_layers": 2, "projection_dim": 16},
        "vision_config": {"image_size": 8, "patch_size": 2},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, refused = assert_told(tmp_path / "config.json", mutations(config, NUMBER), lambda: read_config(tmp_path))
    assert loaded and refused > NUMBER / 2


@pytest.mark.slow
def test_a_tokenizer(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (folder / "manifest.json").unlink()

    def load() -> None:
        text = PromptTokenizer.load(folder)
        try:
            ids, _ = text(["a cat"])
        except UserError:  # by other rules its words may be no words
            return
        assert ids.min() >= 0 and ids.max() < tiny.CONFIG.language.vocab_size

    load()
    path = folder / "tokenizer.json"
    assert_told(path, mutations(json.loads(path.read_text()), NUMBER), load)


@pytest.mark.slow
def test_an_index_of_weights(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        save_file({key: tensors[key] for key in places if places[key] == name}, folder / name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_told(
        path,
        mutations(json.loads(path.read_text()), NUMBER),
        lambda: sorted(stored_tensors(folder)),
        sorted(stored_tensors(folder)),
    )


@pytest.mark.slow
def test_the_manifest_of_an_export(checkpoint):
    path = checkpoint / "manifest.json"
    document = json.loads(path.read_text())
    del document["files"]
    assert_told(path, mutations(document, NUMBER), lambda: [made_by(str(checkpoint)), read_config(checkpoint)])


class Grids:
    """Random grids of codes as a neighbour set's images."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> dict:
        image = np.zeros((*stored.GRID, 3), np.uint8)
        image[..., 0] = np.random.default_rng(i).integers(0, stored.CODES, stored.GRID)
        return {"image": image, "caption": f"image {i}".encode()}


@pytest.mark.slow
def test_the_manifest_of_a_neighbour_set(tmp_path, signed):
    settings = NeighborSettings(
        fingerprint="f", grid=stored.GRID, codebook_size=stored.CODES, num_images=7, shard_size=3, source="grids",
        split="train", k=2, keys="codebook", search="dense", scann=ScannOptions(), datastore="d", store_images=5,
    )  # fmt: skip

    def search(codes, names, captions, done) -> Neighbors:
        found = np.random.default_rng(len(codes)).integers(0, stored.CODES, (len(codes) * 9, 2)).astype(np.int32)
        return Neighbors(found, np.zeros(found.shape, np.float32), found)

    images = EncodedImages(Grids(), "grid {}".format, stored.encode, 4)
    writer.build_neighbor_set(tmp_path, images, search, settings)

    def load() -> list[bytes]:
        found = NeighborSet.open(tmp_path)
        found.require_tokenizer("f")
        return [found[i][name].tobytes() for i in range(len(found)) for name in ("codes", "neighbors")]

    path = tmp_path / "manifest.json"
    loaded, refused = assert_told(path, mutations(json.loads(path.read_text()), NUMBER), load, load())
    assert loaded and refused > NUMBER / 2


@pytest.mark.slow
def test_the_records_of_unfinished_work(tmp_path):
    settings = Datastore.open(stored.build(tmp_path / "store").directory).settings
    path = tmp_path / "building.json"
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    same = lambda: building.require_same_settings(Datastore, tmp_path, settings)  # noqa: E731
    (tmp_path / "store").rename(tmp_path.parent / f"{tmp_path.name}-store")
    assert_told(path, mutations(dataclasses.asdict(settings), NUMBER), same, "begun")


@pytest.mark.slow
def test_the_records_of_a_run(tmp_path):
    base, step = {"model": "abc", "store": "def"}, tmp_path / "3" / "sums"
    step.mkdir(parents=True)
    for path, content, load in (
        (tmp_path / "base.json", base, lambda: require_base(tmp_path, base)),
        (
            step / "metadata",
            {"state": {"a": [1, 2], "b": [3, 4]}, "data": "x", "metrics": "y"},
            lambda: read_sums(tmp_path / "3"),
        ),
        (
            tmp_path / "metrics.jsonl",
            {"step": 3, "steps_per_second": 2.0, "loss": 1.0},
            lambda: training_minutes(tmp_path, 9),
        ),
    ):
        path.write_text(json.dumps(content))
        assert_told(path, mutations(content, NUMBER), load)


def test_the_mutations_are_as_many_as_are_promised(store):
    assert len(mutations(json.loads((store / "manifest.json").read_text()), NUMBER)) > NUMBER
