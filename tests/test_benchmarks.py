"""Laws of the benchmarks: each one is what ``interfaces.Benchmark`` says, scores batch by batch, and stands alone."""

import inspect

import numpy as np
import pytest
from test_house import imported_names, modules

from arrag_jax.config import DataSetConfig
from arrag_jax.data.emoji.scenes import scene
from arrag_jax.eval import run
from arrag_jax.evaluation.benchmarks import BENCHMARKS, benchmark_flags, is_folder_benchmark, open_benchmark
from arrag_jax.evaluation.emoji.object_score import object_score
from arrag_jax.interfaces import Benchmark, ImageBatch


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not is_folder_benchmark(name)])
def test_every_benchmark_is_one(name):
    benchmark = open_benchmark(name, DataSetConfig())
    assert isinstance(benchmark, Benchmark) and benchmark.images_per_prompt >= 1
    assert list(benchmark.prompts(3)) == list(benchmark.prompts(5))[:3]


@pytest.mark.slow
def test_the_score_of_batches_is_that_of_all_images():
    benchmark, count = open_benchmark("emoji_scenes", DataSetConfig()), 24
    scenes = [scene("test", i) for i in range(count)]
    assert benchmark.prompts(count) == [s.caption for s in scenes]
    truth = benchmark.true_images(np.arange(count))
    runs = [truth, np.where(np.arange(count)[:, None, None, None] % 3 == 0, truth[::-1], truth)]

    def batches(images, size):
        for start in range(0, count, size):
            yield ImageBatch(np.arange(start, min(start + size, count)), images[start : start + size])

    expected = [object_score(images, scenes) for images in runs]
    row = benchmark.score(batches(images, size) for images, size in zip(runs, (5, 7), strict=True))
    overall = [result["overall"] for result in expected]
    assert overall[0] == 1 > overall[1]
    assert (row["mean"], row["std"]) == (np.mean(overall), np.std(overall, ddof=1))
    for family, mean in row["families"].items():
        assert mean == np.mean([result["families"][family] for result in expected])
    held_out = np.array([s.held_out for s in scenes])
    right = np.stack([result["right"] for result in expected])
    assert row["held_out_pairs"] == right[:, held_out].mean() and row["other_prompts"] == right[:, ~held_out].mean()


@pytest.mark.slow
def test_evaluation_and_commands_import_no_benchmark():
    """They know benchmarks by name alone."""
    folders = {path.split(".")[2] for path in BENCHMARKS.values()}
    outside = {
        name: tree
        for name, tree in modules().items()
        if name.split(".")[0] in ("evaluation", "eval", "generate", "decode") and not folders & set(name.split("."))
    }
    assert not [
        name for name, tree in outside.items() for word in imported_names(tree) if folders & set(word.split("."))
    ]


def test_flags_of_benchmarks_do_not_hide_those_of_eval():
    assert not benchmark_flags().keys() & inspect.signature(run).parameters.keys()
