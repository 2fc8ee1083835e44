"""Commands that share work over Ray, with machines that come and go and drivers that end: the bytes of one process."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from arrag_jax import build_datastore, build_neighbors, eval
from arrag_jax.config import (
    DatastoreConfig,
    DrawConfig,
    MeshConfig,
    NeighborsConfig,
    RetrievalConfig,
    SamplingConfig,
)
from arrag_jax.evaluation.feature_store import FeatureStore
from arrag_jax.evaluation.image_sets import reference_set
from arrag_jax.evaluation.metrics.features import Extractor
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.work import Opened, open_engine
from helpers import children, cluster, folders, tiny
from helpers.cluster import wait_until
from helpers.folders import contents

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "arrag_jax" / "assets" / "emoji_janus")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)"),
]


def build_all(address: str) -> None:
    """A driver: a store with hidden keys and two indexes, latents added to it, a segment appended, and neighbours."""
    data = {"model": MODEL, "source": "emoji_scenes/tiny", "data_dir": "data"}
    first = DatastoreConfig(
        **data, num_images=40, batch_size=8, shard_size=4, keys=("codebook", "hidden"), captions=True,
        indexes=("codebook", "hidden"), index_shards=2, hidden_numbers=8,
    )  # fmt: skip
    wider = dataclasses.replace(first, keys=("codebook", "latent", "hidden"))
    retrieval = RetrievalConfig("store", k=3, search="dense")
    neighbors = NeighborsConfig(
        **data, retrieval=retrieval, train_split="store[4:20]", valid_split="valid[:3]", batch_size=2, shard_size=6
    )
    more = dataclasses.replace(wider, num_images=0, split="valid[:9]")
    for config, append in ((first, False), (wider, False), (more, True)):
        build_datastore.run(config, "store", append=append, ray=address)
    build_neighbors.run(neighbors, "neighbors", ray=address)


def test_every_kind_of_work_has_the_same_bytes(tmp_path, monkeypatch):
    """One node alone begins; a second one joins, and is killed at its first shard of hidden keys."""
    monkeypatch.chdir(tmp_path)

    def build(address: str = "") -> dict[str, bytes]:
        cluster.drive("test_on_ray_chain:build_all", address, seconds=900)
        made = {f"{name}/{x}": y for name in ("store", "neighbors") for x, y in contents(Path(name)).items()}
        for name in ("store", "neighbors"):
            shutil.rmtree(name)
        return made

    whole, found = build(), []
    with cluster.running(1) as ray:

        def join_and_die() -> None:
            wait_until(lambda: list(Path("store").glob("codes-*")), 240)
            node = ray.add()
            wait_until(lambda: node.workers() and list(Path("store").glob("hidden-*/hidden-*.arrayrecord")), 240)
            for worker in node.workers():
                worker.suspend()
            node.raylet.kill()

        with beside(join_and_die):
            found = build(ray.address)
    assert found == whole


PROMPTS = [f"{number} {thing}" for number in ("one", "two") for thing in ("cat", "dog", "car", "cup", "star", "house")]


def draw(address: str, out: str) -> None:
    """A driver: draws 48 pictures of the prompts in the working folder."""
    sampling, mesh = SamplingConfig(1.5), MeshConfig(1, 1)
    config = DrawConfig("model", RetrievalConfig("none"), sampling=sampling, mesh=mesh, batch_size=4)
    flags = {"prompts": "prompts.txt", "copies": 4, "method": "plain", "known_words": True, "draw_only": True}
    eval.run(config, out, "distances", "test", 600, 1500, False, False, ray=address, ray_cores=1, **flags)


def test_pictures_have_the_same_bytes(tmp_path, monkeypatch):
    """A worker is killed, a machine joins and is killed, and the driver is killed and run again."""
    monkeypatch.chdir(tmp_path)
    language = dataclasses.replace(tiny.CONFIG.language, vocab_size=64)
    save_model(tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language, pad_id=2)), tmp_path / "model")
    PromptTokenizer.of_words(PROMPTS).save(tmp_path / "model")
    Path("prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    cluster.drive("test_on_ray_chain:draw", "", "whole", seconds=900)
    with cluster.running(1) as ray:
        first = ray.nodes[0]

        def drawn() -> int:
            return len(list(Path("out").glob("*.png")))

        def kill() -> None:
            wait_until(lambda: drawn() and first.workers(), 300)
            first.workers()[0].kill()
            node, before = ray.add(), drawn()
            wait_until(lambda: node.workers() and drawn() > before, 300)
            for worker in node.workers():
                worker.suspend()
            node.raylet.kill()
            driver.kill()

        with cluster.driving("test_on_ray_chain:draw", ray.address, "out") as driver, beside(kill):
            driver.communicate(timeout=900)
        assert driver.returncode == -signal.SIGKILL and 0 < drawn() < 48
        cluster.drive("test_on_ray_chain:draw", ray.address, "out", seconds=900)
    assert contents(Path("out")) == contents(Path("whole"))
    assert len(contents(Path("out"))) == 49


def stand_in() -> Extractor:
    """A random projection in place of a network."""
    projection = np.random.default_rng(0).normal(size=(8 * 10 * 3, 6)).astype(np.float32)
    return Extractor(
        "stand-in", 6, lambda x: x[:8, :10] / np.float32(255), lambda x: x.reshape(len(x), -1) @ projection
    )


def measure(address: str, images: str, out: str) -> None:
    """A driver: computes features of a folder's images."""
    with open_engine(address, 1) as engine:
        store, found = FeatureStore(Path(out)), reference_set(images)[0]
        features, identity = store.features(found, Opened(stand_in), "images", engine)
    np.savez(f"{out}/all.npz", features=features)
    print(identity)


def test_features_have_the_same_bytes(tmp_path, monkeypatch):
    """Some of them are there already."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(300):
        image = np.random.default_rng(number).integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(image).save(f"images/{number:03d}.png")
    said = cluster.drive("test_on_ray_chain:measure", "", "images", "whole").splitlines()[-1]
    shutil.copytree("whole", "out")
    next(Path("out").glob("??/*.npz")).unlink()
    with cluster.running(2) as ray:
        assert said == cluster.drive("test_on_ray_chain:measure", ray.address, "images", "out").splitlines()[-1]
    assert contents(Path("out")) == contents(Path("whole"))
    assert len(contents(Path("out"))) == 4


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Runs this meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield
        done.result(300)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_keeps_what_is_whole_and_its_command_goes_on(tmp_path, number):
    """On a cluster that it has started; none of its processes is left."""
    config = dataclasses.replace(folders.config(tmp_path), shard_size=1)
    whole, store = folders.built(config, tmp_path / "whole"), tmp_path / "store"
    fields = {"source": config.source, "model": config.model, "batch_size": 4, "shard_size": 1, "max_bad_fraction": 0.1}
    command = [sys.executable, "-m", "arrag_jax.build_datastore", "--config=configs/folder_datastore.py", "--ray=local"]
    command += ["--ray_cores=1", "--config.indexes=()", f"--workdir={store}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    pipes = {"cwd": ROOT, "env": children.alone(8), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as driver:
        wait_until(lambda: len(list(store.glob("codes-*"))) > 2 or driver.poll() is not None, 240)
        own = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        lines = driver.communicate(timeout=120)[1].splitlines()
    assert own
    if number == signal.SIGINT:
        assert (driver.returncode, lines[-1]) == (130, "error: interrupted; run the same command again to continue")
    wait_until(lambda: not any(process.is_running() for process in own), 180)  # two agents stay for about a minute
    kept = {name: x for name, x in contents(store).items() if name.startswith(("codes-", "sources-"))}
    assert len(kept) > 2 and not (store / "manifest.json").exists()
    assert subprocess.run(command, **pipes).returncode == 0
    built, alone = contents(store), contents(whole.directory)
    del built["manifest.json"], alone["manifest.json"]  # it tells the command
    assert built == alone and kept.items() <= built.items()
    assert not [name for name in os.listdir(store) if name.startswith(".")]
