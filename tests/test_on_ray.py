"""Work on a Ray cluster: the same bytes as in one process, whatever died; one clear line where it cannot be done."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

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


class Squares:
    """A worker that does even numbers alone, cannot begin with an odd ``first``, and dies once if it gets a mark."""

    def __init__(self, first: int = 0, mark: str = ""):
        self._mark = mark
        if first % 2:
            raise UserError(f"{first} is no way to begin")

    def __call__(self, item: int, report) -> int:
        report.tell(f"at {item}")
        if self._mark and not os.path.exists(self._mark):
            open(self._mark, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if item % 2:
            raise UserError(f"{item} is odd; give an even number")
        return item * item


def squares(address: str, mark: str) -> None:
    """The driver of the next test."""
    sizes = dict.fromkeys(range(6), 1)
    with open_engine(address, 1) as engine:
        work = run_work([0, 2, 4, 3], functools.partial(Squares, mark=mark), sizes, "squares", engine=engine)
        with pytest.raises(UserError, match=r"shard 3 of squares failed 3 times, the last time on .*: 3 is odd; give"):
            for item, square in work:
                assert square == item * item
                print("square", square)
        with pytest.raises(UserError, match=r"a worker on .* cannot begin: 1 is no way to begin"):
            list(run_work([0], functools.partial(Squares, 1), {0: 1}, "odd squares", engine=engine))


@pytest.mark.slow
@pytest.mark.long
def test_what_fails_is_tried_three_times_and_named_and_what_workers_tell_is_told(tmp_path):
    """A worker is killed at its first item."""
    with cluster.running(1) as ray:
        lines = set(cluster.drive("test_on_ray:squares", ray.address, str(tmp_path / "mark")).splitlines())
    assert {"at 0", "at 2", "at 4", "square 0", "square 4", "square 16"} <= lines
    assert (tmp_path / "mark").exists()


def build(address: str, folder: str, store: str) -> None:
    """The driver of the next test."""
    build_datastore.run(folders.config_in(Path(folder)), store, ray=address)


@pytest.mark.long
def test_a_store_is_the_same_though_a_worker_and_a_machine_die(config, tmp_path):
    """Both are in the middle of a shard. The rest of the work is done by a new worker of the machine that is left."""
    folder, store, errors = str(Path(config.source).parent), tmp_path / "store", []
    cluster.drive("test_on_ray:build", "", folder, str(tmp_path / "whole"))

    def kill(first: cluster.Node, second: cluster.Node) -> None:
        try:
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

    with cluster.running(2) as ray:
        killer = threading.Thread(target=kill, args=ray.nodes)
        killer.start()
        cluster.drive("test_on_ray:build", ray.address, folder, str(store))
        killer.join()
    assert not errors
    assert contents(store) == contents(tmp_path / "whole")
    assert not [path.name for path in store.iterdir() if path.name.startswith(".")]


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


@pytest.mark.slow
def test_nobody_imports_ray_or_a_web_framework_who_does_not_ask_for_it(config, tmp_path):
    commands = "build_datastore, build_neighbors, cli, eval, generate, serve, studio, train"
    script = f"import sys; from arrag_jax import {commands}; "
    script += "sys.exit(bool({'ray', 'fastapi', 'gradio', 'starlette', 'uvicorn'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], env=children.alone(), cwd=tmp_path).returncode == 0


def test_one_way_to_share_work_is_enough(config, tmp_path, monkeypatch):
    for name, value in children.together(2)[0].items():
        if name.startswith("JAX_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--ray=local starts workers itself"):
        build_datastore.run(config, str(tmp_path / "store"), ray="local")
    assert os.listdir(tmp_path) == []
