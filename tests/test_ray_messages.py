"""What is told when a cluster, or one of its machines, does not do; a stand-in for Ray raises what Ray raises there."""

import os
import re
import sys
import types

import pytest

from arrag_jax import command, files, on_ray
from arrag_jax.errors import UserError
from arrag_jax.ray_actor import Hand, versions
from arrag_jax.work import open_engine


class Died(Exception):
    """An error of a worker, as Ray hands it over."""

    def __init__(self, cause: Exception | None = None, words: str = ""):
        super().__init__(words)
        self.cause = cause


@pytest.fixture
def ray(monkeypatch):
    """The package, as far as these paths ask for it; the environment that ``join`` sets is set back."""
    for name in (*on_ray.QUIET, *on_ray.LOOPBACK, *on_ray.LOCAL, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(files, "name_writer", lambda name: None)
    monkeypatch.setattr(command, "enable_compilation_cache", lambda: None)
    fake = types.ModuleType("ray")
    fake.is_initialized = lambda: False
    fake.get = lambda reference: reference
    context = types.SimpleNamespace(get_node_id=lambda: "node")
    fake.get_runtime_context = lambda: context
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "auto",
            RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.9.0\n Python: 3.10.1\nThis …"),
            r"at --ray=auto has another version of Ray or Python: .* Ray: 2.9.0 Python: 3.10.1 .*; use one on all mach",
        ),
        (
            "auto",
            ConnectionError("Could not find any running Ray instance. Please specify the one to connect to …"),
            r"no Ray cluster runs on this machine \(--ray=auto\); start one: ray start --head, or give --ray=local",
        ),
        (
            "local",
            Exception("The current node timed out during startup. This could happen because …"),
            r"cannot join the Ray cluster --ray=local: The current node timed out during startup",
        ),
        (
            "local",
            OSError(28, "No space left on device"),
            r"cannot join the Ray cluster --ray=local: .*No space left on device; run the command on one of its mach",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_in_one_line(ray, address, error, message):
    def init(*_, **__):
        raise error

    ray.init = init
    with pytest.raises(UserError, match=message) as told, open_engine(address):
        pass
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("address", ["local", "auto"])
def test_local_starts_a_cluster_though_another_one_runs(ray, address):
    """Without an address Ray joins a cluster that it finds on the machine."""
    given, ended = [], []
    ray.init, ray.shutdown = lambda *words, **_: given.append(words), lambda: ended.append(1)
    with open_engine(address):
        assert given == [(address,)] and not ended
    assert ended


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=re.escape("--ray=auto needs the package ray; install it: pip install 'arrag")):
        on_ray.join("auto")


def test_a_machine_says_what_it_lacks(ray, tmp_path):
    def unfit() -> None:
        raise UserError("source=photos: no such file or folder")

    def problem(wanted=None, folder=".", make=lambda: None) -> str:
        host, node, words = Hand().open(wanted or versions(), "cpu", str(folder), [make])
        assert host and node == "node"
        return words

    assert problem() == ""
    other = versions() | {"jax": "0.0.1"}
    assert re.fullmatch(r"it has jax [\d.]+, not 0.0.1; install the same on all machines", problem(other))
    gone = tmp_path / "gone"
    assert problem(folder=gone).startswith(f"it cannot enter {gone}, where the command runs (No such file or dir")
    assert problem(make=unfit) == "source=photos: no such file or folder"


def test_a_worker_of_the_same_key_stays_open(ray):
    opened = []
    hand = Hand()
    for key in ("a", "a", "b", ""):
        assert hand.open(versions(), "cpu", ".", [lambda: opened.append(1)], key)[2] == ""
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Died(UserError("the disk of /shared is full; make room")), "the disk of /shared is full; make room"),
        (
            Died(None, "Traceback …\nModuleNotFoundError: No module named 'arrag_jax'"),
            "the machine lacks the package arrag_jax; install it there in the same version",
        ),
        (
            Died(RuntimeError("Unable to initialize backend 'cuda': no GPU\nset JAX_PLATFORMS='' to …")),
            "RuntimeError: Unable to initialize backend 'cuda': no GPU",
        ),
    ],
)
def test_the_reason_of_a_failure_is_one_line(error, message):
    assert on_ray.reason(error) == message
