"""Several processes that build one store: the same bytes as one alone, and none waits for the dead."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arrag_jax.config import DatastoreConfig
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.store import from_images
from arrag_jax.store.datastore import Datastore
from arrag_jax.work import Processes, run_work
from helpers import children, folders, working
from helpers.folders import contents, write_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Datastore:
    return folders.built(config, tmp_path_factory.mktemp("stores") / "whole")


def test_two_builders_at_once_make_the_same_store(whole, config, tmp_path):
    """Every shard is written by one of them; the same bytes as by one process, also where there is nothing to do."""
    tokenizer, errors, store = load_tokenizer(config.model), [], tmp_path / "store"

    def work(engine: Processes) -> None:
        try:
            for _ in range(2):
                from_images.build(config, store, tokenizer, engine)
            assert from_images.build(config, tmp_path / "none", tokenizer, engine, whole=Datastore.open(store)) is None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in reversed(working.in_threads(2))]
    for thread in threads:
        thread.start()
        time.sleep(0.3)  # the leader comes late
    for thread in threads:
        thread.join(60)
    assert not errors
    assert contents(store) == contents(whole.directory)
    assert not (tmp_path / "none").exists()


def test_each_process_has_a_fixed_share_whatever_is_left():
    """Also where the processes see different items left, because others have finished some meanwhile."""
    make, sizes = lambda: lambda item, report: item * item, dict.fromkeys(range(7), 1)
    shares = [
        dict(run_work(left, make, sizes, "squares", engine=Processes(index, 2)))
        for index, left in enumerate((range(7), range(3, 7)))
    ]
    assert shares == [{0: 0, 2: 4, 4: 16, 6: 36}, {3: 9, 5: 25}]


def processes(config: DatastoreConfig, store: Path, **changes) -> list[subprocess.Popen]:
    """The command in two processes on loopback."""
    fields = {"source": config.source, "model": config.model, "batch_size": 4, "shard_size": 5, "max_bad_fraction": 0.1}
    overrides = [f"--config.{name}={value}" for name, value in (fields | changes).items()]
    command = [sys.executable, "-m", "arrag_jax.build_datastore", "--config=configs/folder_datastore.py"]
    command += [*overrides, "--config.indexes=()", f"--workdir={store}"]
    return [
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for env in children.together(2)
    ]


@pytest.mark.slow
def test_two_processes_build_what_one_does(whole, config, tmp_path):
    running = processes(config, tmp_path / "store")
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    built, alone = contents(tmp_path / "store"), contents(whole.directory)
    command = Datastore.open(tmp_path / "store").settings.command
    assert "shard_size" in command
    del built["manifest.json"], alone["manifest.json"]  # it tells the command
    assert built == alone


@pytest.mark.slow
def test_a_killed_process_ends_the_other_at_the_end_of_its_share(config, tmp_path):
    source = write_scenes(tmp_path / "photos", range(60))
    running = processes(config, tmp_path / "store", source=str(source), batch_size=1, shard_size=2)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "store").glob("codes-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    error = running[0].communicate(timeout=120)[1]
    assert running[0].returncode == 2, error
    assert "because process 1 of 2 died; start all processes again with the same command to continue" in error
    assert time.monotonic() - killed < 60
    written = {int(path.name[6:11]) for path in (tmp_path / "store").glob("codes-*")}
    assert set(range(0, 30, 2)) <= written != set(range(30))  # the other one has finished its own share
