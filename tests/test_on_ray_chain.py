"""Commands that share work over Ray, with machines that come and go and drivers that end: the bytes of one process."""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from arrag_jax import build_datastore, build_neighbors
from arrag_jax.config import DatastoreConfig, NeighborsConfig, RetrievalConfig
from helpers import children, cluster, folders
from helpers.cluster import wait_until
from helpers.folders import contents

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "arrag_jax" / "assets" / "emoji_janus")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)"),
]


def test_every_kind_of_work_has_the_same_bytes(tmp_path, monkeypatch):
    """A store with hidden keys and two indexes, latents added to it, a segment appended, and a neighbour set.

    One node alone begins; a second one joins, and is killed at its first shard of hidden keys.
    """
    monkeypatch.chdir(tmp_path)
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

    def build(ray: str = "") -> dict[str, bytes]:
        shutil.rmtree("store", ignore_errors=True)
        shutil.rmtree("neighbors", ignore_errors=True)
        for config in (first, wider):
            build_datastore.run(config, "store", ray=ray)
        build_datastore.run(dataclasses.replace(wider, num_images=0, split="valid[:9]"), "store", append=True, ray=ray)
        build_neighbors.run(neighbors, "neighbors", ray=ray)
        return {
            f"{folder}/{name}": x for folder in ("store", "neighbors") for name, x in contents(Path(folder)).items()
        }

    whole, errors = build(), []
    shutil.rmtree("store")

    def join_and_die() -> None:
        try:
            wait_until(lambda: list(Path("store").glob("codes-*")), 240)
            node = ray.add()
            wait_until(lambda: node.workers() and list(Path("store").glob("hidden-*/hidden-*.arrayrecord")), 240)
            for worker in node.workers():
                worker.suspend()
            node.raylet.kill()
        except BaseException as error:
            errors.append(error)

    with cluster.running(1) as ray:
        other = threading.Thread(target=join_and_die)
        other.start()
        found = build(ray.address)
        other.join()
    assert not errors
    assert found == whole


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
    wait_until(lambda: not any(process.is_running() for process in own), 30)
    kept = {name: x for name, x in contents(store).items() if name.startswith(("codes-", "sources-"))}
    assert len(kept) > 2 and not (store / "manifest.json").exists()
    assert subprocess.run(command, **pipes).returncode == 0
    built, alone = contents(store), contents(whole.directory)
    del built["manifest.json"], alone["manifest.json"]  # it tells the command
    assert built == alone and kept.items() <= built.items()
    assert not [name for name in os.listdir(store) if name.startswith(".")]
