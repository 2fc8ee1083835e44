"""Several processes that build one store: the same bytes as one alone, and none waits for the dead."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arrag_jax.config import DatastoreConfig
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.store import from_images, workers
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.workers import workers_in
from helpers import children, folders
from helpers.folders import contents, write_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Datastore:
    return folders.built(config, tmp_path_factory.mktemp("stores") / "whole")


def test_a_member_that_falls_silent_ends_the_others(tmp_path, monkeypatch):
    """One that leaves is told at once, one that was killed after the silence; one that works is waited for."""
    monkeypatch.setattr(workers, "BEAT", 0.02)
    monkeypatch.setattr(workers, "SILENCE", 0.4)
    with workers_in(tmp_path, 0, 2) as first:
        with workers_in(tmp_path, 1, 2):
            late = time.monotonic() + 1.0  # longer than the silence
            first.wait_until(lambda: time.monotonic() > late)
        with pytest.raises(UserError, match="process 1 of 2 has ended"):
            first.wait_until(lambda: False)
    with workers_in(tmp_path, 0, 2) as first:
        (tmp_path / ".process-00001").write_text("killed long ago")
        with pytest.raises(UserError, match="process 1 of 2 gave no sign of life"):
            first.wait_until(lambda: False)
    assert not (tmp_path / ".process-00000").exists()


def test_the_sign_that_a_killed_run_left_is_gone_before_the_first_one(tmp_path, monkeypatch):
    (tmp_path / ".process-00001").write_text("killed 7 stopping")
    monkeypatch.setattr(workers.Workers, "_give_signs", lambda *_: None)
    with workers_in(tmp_path, 1, 2):
        assert not (tmp_path / ".process-00001").exists()


def test_two_builders_at_once_make_the_same_store(whole, config, tmp_path):
    """In two threads, as members of one team: every shard by one of them, the same bytes as by one alone."""
    tokenizer = load_tokenizer(config.model)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with workers_in(tmp_path / "store", index, 2) as members:
                from_images.build(config, tmp_path / "store", tokenizer, members)
                if index:
                    members.wait_for_leader_to_leave()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)  # the leader comes late
    for thread in threads:
        thread.join(60)
    assert not errors
    assert contents(tmp_path / "store") == contents(whole.directory)


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
def test_a_killed_process_ends_the_other_within_a_minute(config, tmp_path):
    source = write_scenes(tmp_path / "photos", range(400))
    running = processes(config, tmp_path / "store", source=str(source), batch_size=1, shard_size=2)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "store").glob("codes-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    error = running[0].communicate(timeout=120)[1]
    assert running[0].returncode == 2, error
    assert "error: process 1 of 2 gave no sign of life for 30 s; run the same command again" in error
    assert time.monotonic() - killed < 60
