"""Every test runs with shape checking on and with implicit rank promotion forbidden."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from helpers import children, golden, launching

# Eight virtual devices, so that the tests of meshes run anywhere; set before jax wakes.
FLAGS = f" --xla_force_host_platform_device_count=8 {children.QUICK}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is XLA's: what one test or command has compiled, the next ones of this run read.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker shares the folder of the process that started it
    CACHE = tempfile.mkdtemp(prefix="arrag_jax_xla_")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from jaxtyping import install_import_hook

install_import_hook("arrag_jax", "beartype.beartype")

import jax
import pytest

from arrag_jax.retrieval import leave_one_out

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Callable[..., Path]:
    """Gives the path of golden numbers of the official AR-RAG by their name, or of a checkpoint (``…_layout``).

    ``whole``: as of ``golden.find``.
    """
    made = tmp_path_factory.mktemp("reference")

    def path(name: str, whole: bool = False) -> Path:
        shared, folder = golden.SHARED / "reference" / "dev" / name, made / name
        if shared.exists() or not name.endswith("_layout"):
            return golden.find("dev", name, whole)
        return folder if folder.exists() else golden.write_checkpoint(folder, name == "faid_layout")

    return path


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of real photos; skips where it is absent."""
    path = golden.SHARED / "data"
    if not path.is_dir():
        pytest.skip("real photos are not on this machine (../shared/data)")
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the launch scripts among stand-ins (``launching.make_repository``)."""
    return launching.make_repository(tmp_path)


@pytest.fixture(scope="module")
def small_calls():
    """A hundred contexts a call of the search for neighbours (K 3), not thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leave_one_out, "ANSWERS", 300)
        yield
