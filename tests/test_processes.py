"""Several processes on one machine: they draw what one process draws, and end when one of them dies.

Run as a script, this file is one of those processes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from arrag_jax.config import MeshConfig, RetrievalConfig, ScannOptions
from arrag_jax.decode.loop import SampleOutput, sample
from arrag_jax.decode.policies import Daid
from arrag_jax.errors import run_command
from arrag_jax.mesh import PATIENCE, make_mesh, start_distributed
from arrag_jax.retrieval import index
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.datastore import Datastore
from helpers import children, stored, tiny, workshop

ROOT = Path(__file__).resolve().parents[1]
LAST_LINE = "error: this process ended before its work was done"
pytestmark = [pytest.mark.slow, pytest.mark.long]


def start(processes: int, *command: str, devices: int = 1) -> list[subprocess.Popen]:
    """``python COMMAND`` as so many processes of one run."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([sys.executable, *command], env=env, **pipes) for env in children.together(processes, devices)
    ]


def draw(
    store: str, mesh: jax.sharding.Mesh | None, searches: tuple[str, ...] = ("dense", "scann")
) -> dict[str, SampleOutput]:
    """Four pictures with each search. Keys of random latents have no ties, so that the draws of all must agree."""
    model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3, 5, 2))
    where, drawn = () if mesh is None else (mesh, "fsdp", "data"), {}
    for search in searches:
        config = RetrievalConfig(store, k=6, keys="latent", search=search)
        _, retriever = load_retriever(config, "f", *where)
        drawn[search] = sample(model, ids, Daid(0.6, 0.5), retriever, prompt_mask=mask, mesh=mesh)
    return drawn


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """With a saved index of two shards."""
    store = stored.build(tmp_path_factory.mktemp("store") / "store")
    index.build_index(store, "latent", ScannOptions(), shards=2)
    return str(store.directory)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> dict[str, SampleOutput]:
    """By one process and an index of one shard."""
    copy = Datastore.open(shutil.copytree(store, tmp_path_factory.mktemp("store") / "copy"))
    index.build_index(copy, "latent", ScannOptions())
    return draw(str(copy.directory), None)


@pytest.mark.parametrize(("processes", "data"), [(2, 1), (4, 2)], ids=["2", "4"])
def test_processes_draw_what_one_draws(store, alone, tmp_path, processes, data):
    """The store is spread over two processes; with four, the batch over two at the same time."""
    started = start(processes, __file__, store, str(PATIENCE), str(data), str(tmp_path / "drawn.npz"))
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors
    together = np.load(tmp_path / "drawn.npz")
    for name, drawn in alone.items():
        for field in ("codes", "source", "rank"):
            np.testing.assert_array_equal(together[f"{name}/{field}"], getattr(drawn, field), err_msg=f"{name} {field}")
        for field in ("log_p", "log_p_model", "distance"):
            np.testing.assert_allclose(together[f"{name}/{field}"], getattr(drawn, field), atol=1e-5)


def test_generate_in_two_processes_writes_what_one_writes(tmp_path):
    workshop.build(tmp_path)
    command = ["-m", "arrag_jax.generate", "--config=configs/emoji_daid.py", "--prompt=a cat", "--prompt=two dogs"]
    command += [f"--config.model={tmp_path / 'model'}", f"--config.retrieval.store={tmp_path / 'store'}"]
    command += ["--config.retrieval.search=dense", "--config.daid.weight=0.5", "--method=daid"]
    together = start(
        2,
        *command,
        f"--workdir={tmp_path / 'two'}",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        devices=2,
    )
    errors = [process.communicate()[1] for process in together]
    assert [process.returncode for process in together] == [0, 0], errors
    subprocess.run(
        [sys.executable, *command, "--config.mesh.data=1", f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT,
        env=children.alone(devices=2),
        check=True,
    )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    # The page of provenance colours roundings: what it shows is compared below, in numbers.
    drawn = [name for name in names if name.endswith("_daid.png") and not name.startswith("provenance")]
    assert len(drawn) == 2
    for name in drawn:
        pictures = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("one", "two")]
        np.testing.assert_array_equal(*pictures, err_msg=name)
    one, two = (json.loads((tmp_path / folder / "provenance.json").read_text()) for folder in ("one", "two"))
    for a, b in zip(one, two, strict=True):  # which of several patches at one distance comes first, may differ
        assert [position["code"] for position in a["cells"]] == [position["code"] for position in b["cells"]]
        assert [position["rank"] is None for position in a["cells"]] == [
            position["rank"] is None for position in b["cells"]
        ]
        away = [[position["distance"] for position in x["cells"] if position["rank"] is not None] for x in (a, b)]
        np.testing.assert_allclose(*away, atol=1e-5)


@pytest.mark.parametrize("killed", [0, 1], ids=["the first", "another"])
def test_when_a_process_dies_the_others_end_and_say_so(store, killed):
    assert PATIENCE < 60  # the default; here it is shorter, so that the test is, too
    processes = start(3, __file__, store, "10", "1")
    try:
        for process in processes:
            assert "drawing\n" in iter(process.stdout.readline, "")  # after lines of the library's own
        processes[killed].kill()
        for process in processes:
            _, error = process.communicate(timeout=60)
            assert process.returncode != 0 and error.splitlines()[-1].startswith(LAST_LINE), error
    finally:
        for process in processes:
            process.kill()


def main(argv: list[str]) -> None:
    """One of the processes: STORE PATIENCE DATA [OUT]; without a place for its pictures it draws for ever."""
    start_distributed(int(argv[2]))
    mesh = make_mesh(MeshConfig(int(argv[3]), -1))
    while len(argv) == 4:
        draw(argv[1], mesh, ("dense",))
        print("drawing", flush=True)
    drawn = draw(argv[1], mesh)
    if jax.process_index() == 0:
        fields = {f"{name}/{f}": np.asarray(x) for name, one in drawn.items() for f, x in one._asdict().items()}
        np.savez(argv[4], **fields)


if __name__ == "__main__":
    run_command(main, sys.argv)
