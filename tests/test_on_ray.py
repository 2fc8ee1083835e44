"""Work on a Ray cluster: the same bytes as in one process, whatever died; one clear line where it cannot be done."""

import importlib.util
import os
import subprocess
import sys
import threading

import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig
from arrag_jax.errors import UserError
from arrag_jax.work import open_engine, run_work
from helpers import children, cluster, folders
from helpers.cluster import wait_until
from helpers.folders import contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def ray():
    with cluster.running(2) as running:
        yield running


@pytest.mark.long  # joins a cluster in a process that has run other tests; this has hung once
def test_a_store_is_the_same_though_a_worker_and_a_machine_die(config, ray, tmp_path):
    """Both are in the middle of a shard. The rest of the work is done by a new worker of the machine that is left."""
    whole, store, errors = folders.built(config, tmp_path / "whole"), tmp_path / "store", []

    def kill() -> None:
        try:
            first, second = ray.nodes
            wait_until(lambda: first.workers() and second.workers() and list(store.glob("codes-*")))
            (worker,), (other,) = first.workers(), second.workers()
            for process in (worker, other):
                process.suspend()  # so that an item is in its hands when it dies
            wait_until(lambda: worker.status() == other.status() == "stopped")
            worker.kill()
            second.raylet.kill()
            other.kill()
        except BaseException as error:
            errors.append(error)

    killer = threading.Thread(target=kill)
    killer.start()
    build_datastore.run(config, str(store), ray=ray.address)
    killer.join()
    assert not errors
    assert contents(store) == contents(whole.directory)
    assert not [path.name for path in store.iterdir() if path.name.startswith(".")]


class Squares:
    """A worker that does even numbers alone; ``first`` is one that it cannot begin with."""

    def __init__(self, first: int = 0):
        if first % 2:
            raise UserError(f"{first} is no way to begin")

    def __call__(self, item: int, report) -> int:
        report.tell(f"at {item}")
        if item % 2:
            raise UserError(f"{item} is odd; give an even number")
        return item * item


def odd_ones() -> Squares:
    return Squares(1)


@pytest.mark.long
def test_what_fails_is_tried_three_times_and_named_and_what_workers_tell_is_told(ray, capsys):
    with open_engine(ray.address, 1) as engine:
        squares = run_work([0, 2, 4, 3], Squares, dict.fromkeys(range(6), 1), "squares", engine=engine)
        with pytest.raises(UserError, match=r"shard 3 of squares failed 3 times, the last time on .*: 3 is odd; give"):
            for item, square in squares:
                assert square == item * item
        with pytest.raises(UserError, match=r"a worker on .* cannot begin: 1 is no way to begin"):
            list(run_work([0], odd_ones, {0: 1}, "odd squares", engine=engine))
    assert {"at 0", "at 2", "at 4"} <= set(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:1", r"no Ray cluster answers at --ray=localhost:1 \(.*\); start one there: ray start --head"),
        ("nowhere", "--ray=nowhere is not auto, local or HOST:PORT"),
        ("host:port", "--ray=host:port is not auto, local or HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_told_before_work(config, tmp_path, address, message):
    with pytest.raises(UserError, match=message):
        build_datastore.run(config, str(tmp_path / "store"), ray=address)
    assert not (tmp_path / "store").exists()


def test_nobody_imports_ray_who_does_not_ask_for_it(config, tmp_path):
    script = "import sys; from arrag_jax import build_datastore, build_neighbors, cli, eval, generate, train; "
    script += "sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=children.alone(), cwd=tmp_path).returncode == 0


def test_one_way_to_share_work_is_enough(config, tmp_path, monkeypatch):
    for name, value in children.together(2)[0].items():
        if name.startswith("JAX_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--ray=local starts workers itself"):
        build_datastore.run(config, str(tmp_path / "store"), ray="local")
    assert os.listdir(tmp_path) == []
