"""The whole command on a prompt set, in its own processes: killed at any moment, or two at once, to the same bytes."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from arrag_jax.config import DrawConfig, MeshConfig, RetrievalConfig, SamplingConfig
from arrag_jax.evaluation.benchmarks import open_folder_benchmark
from arrag_jax.evaluation.drawn_folder import draw_folder
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.work import HERE, Processes
from helpers import children, tiny
from helpers.drawings import bytes_of

WORDS = ["a cat", "two dogs", "three cats", "a dog", "a blue car", "two stars", "a house", "a red cup", "four pigs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Folder of a tiny model that knows the words of the prompts."""
    folder = tmp_path_factory.mktemp("model")
    language = dataclasses.replace(tiny.CONFIG.language, vocab_size=64)
    save_model(tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language, pad_id=2)), folder)
    PromptTokenizer.of_words(WORDS).save(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """GenEval's lines of these words, with detections of two images each beside them."""
    folder, rng = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    lines = [
        {"tag": "single_object", "include": [{"class": text.split()[-1], "count": 1}], "prompt": f"a photo of {text}"}
        for text in WORDS
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {
            "filename": f"{number:05d}/samples/{copy:04d}.png",
            "detections": [{"class": line["include"][0]["class"], "score": rng.uniform(), "box": [0, 0, 5, 5]}],
        }
        for number, line in enumerate(lines)
        for copy in range(2)
    ]
    (folder / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "lines.jsonl"


def config_of(model: Path, batch_size: int) -> DrawConfig:
    sampling, mesh = SamplingConfig(1.5), MeshConfig(1, 1)
    return DrawConfig(str(model), RetrievalConfig("none"), sampling=sampling, mesh=mesh, batch_size=batch_size)


def draw(model: Path, prompts: Path, out: Path, batch_size: int, engine: Processes = HERE) -> None:
    pipeline = open_pipeline(config_of(model, batch_size), ["plain"], alone=True)
    benchmark = open_folder_benchmark("geneval", str(prompts), 2)
    draw_folder(pipeline, "plain", benchmark, out, engine, known_words=True)


@pytest.mark.slow
def test_two_that_share_the_list_draw_what_one_draws(model, prompts, tmp_path):
    draw(model, prompts, tmp_path / "one", 5)
    barrier = threading.Barrier(2, timeout=100)
    first, other = (Processes(index, 2, lambda value, what: str(barrier.wait())) for index in range(2))
    second = threading.Thread(target=draw, args=(model, prompts, tmp_path / "two", 4, other))
    second.start()
    draw(model, prompts, tmp_path / "two", 4, first)
    second.join()
    assert len(list((tmp_path / "one").glob("*/samples/*.png"))) == 18
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def start(model: Path, prompts: Path, out: Path, batch_size: int, environment: dict[str, str]) -> subprocess.Popen:
    file = prompts.parent / "config.py"
    if not file.exists():
        content = {"model": str(model), "retrieval": {"store": "none"}, "sampling": {"cfg_scale": 1.5}}
        content["mesh"] = {"data": 1, "fsdp": 1}
        text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({content!r})\n"
        file.write_text(text)
    words = [
        *(sys.executable, "-m", "arrag_jax.eval", f"--config={file}", f"--config.batch_size={batch_size}"),
        *("--benchmark=geneval", f"--prompts={prompts}", "--copies=2", "--method=plain", "--known_words"),
        *(f"--detector=file:{prompts.parent / 'found.jsonl'}", f"--workdir={out}"),
    ]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.long
@pytest.mark.slow
def test_a_command_killed_at_twenty_moments_ends_in_the_same_bytes(model, prompts, tmp_path):
    """Ten while it draws, ten while it scores; results.json and the log of detections are among the bytes."""
    finish(start(model, prompts, tmp_path / "whole", 5, children.alone()))
    rng, out, killed, seconds = np.random.default_rng(0), tmp_path / "out", 0, 20.0
    for tries in range(80):
        if killed == 20:
            break
        process, began = start(model, prompts, out, 3 + tries % 4, children.alone()), time.monotonic()
        moment = began + rng.uniform(0.3, 1.0) * seconds
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        is_killed = process.poll() is None
        process.kill()
        said, _ = process.communicate()
        killed += is_killed
        if is_killed and killed == 10:
            finish(start(model, prompts, out, 5, children.alone()))  # from here on, the scoring alone is left
        if not is_killed:
            assert process.returncode == 0, said
            seconds = time.monotonic() - began  # the next moments lie within what such a run takes
            if killed < 10:
                shutil.rmtree(out)
        if killed >= 10 and (killed == 10 or not is_killed):
            for name in ("results.json", "results.jsonl", "detections.jsonl"):
                (out / name).unlink(missing_ok=True)
    assert killed == 20
    finish(start(model, prompts, out, 5, children.alone()))
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(model, prompts, tmp_path):
    table = finish(start(model, prompts, tmp_path / "one", 5, children.alone()))
    both = [start(model, prompts, tmp_path / "two", 4, environment) for environment in children.together(2)]
    said = [finish(process) for process in both]
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert said[0].splitlines()[-4:] == table.splitlines()[-4:] and "single_object" not in said[1]
