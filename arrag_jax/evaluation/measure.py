"""Measures the methods of a config on a benchmark; the implementation of ``eval``."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from arrag_jax import signals
from arrag_jax.config import DrawConfig, MeshConfig
from arrag_jax.decode.methods import BASELINE, METHODS, Search
from arrag_jax.errors import UserError
from arrag_jax.evaluation import sweeps
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.likelihood import bits_per_code, look_up, score_scenes
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.evaluation.tables import bits_table, mean_and_std
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import Benchmark, ImageBatch
from arrag_jax.store.images import reconstruct

PARTS = 3  # parts of the held-out examples; the spread of the likelihood is the spread over these parts
SEED_STEP = 1_000_003  # added to the seeds in each repeat, so that no two images of different repeats share a key
BLOCK = 100  # true images that are scored at once


def evaluate(
    config: DrawConfig,
    workdir: str,
    benchmark: str,
    split: str,
    num_prompts: int,
    num_scenes: int,
    sweep: bool,
    scaling: bool,
) -> None:
    """Measures methods on a benchmark, prints tables, and writes results.json, or the files of ``sweeps``, to a folder.

    Args:
      config: models and store; its mesh must be one device.
      num_prompts: number of prompts in each repeat; 0 = measure the likelihood alone.
      num_scenes: number of held-out examples whose likelihood is measured.
      sweep, scaling: run these functions of ``sweeps`` instead, on the validation split.

    Raises:
      UserError: if a flag is invalid, if the benchmark is unknown, or as ``open_pipeline``.
    """
    signals.begins_anew()
    opened = open_benchmark(benchmark, config.data, split)
    if num_scenes < PARTS:
        raise UserError(f"--num_scenes={num_scenes} must be at least {PARTS}, one for each part of the spread")
    if num_prompts < 0:
        raise UserError(f"--num_prompts={num_prompts} must be at least 0")
    if config.mesh not in (MeshConfig(), MeshConfig(1, 1)):
        raise UserError("eval measures on one device; leave config.mesh out")
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1))
    out = Path(workdir)
    if sweep or scaling:
        opened = open_benchmark(benchmark, config.data, sweeps.SPLIT)
        pipeline = open_pipeline(config, sweeps.NEEDED)
        require_writable(out)
        examples = opened.held_out(num_scenes)
        if not len(examples):
            raise UserError(f"{benchmark} has no examples to choose settings on; leave out --sweep and --scaling")
        print(sweeps.sweep(pipeline, examples, out) if sweep else sweeps.scaling(pipeline, examples))
        return
    pipeline = open_pipeline(config)
    require_writable(out)
    results = measure(pipeline, opened, split, num_prompts, num_scenes)
    write_json(out / "results.json", results)
    print(report(results, opened))


def measure(pipeline: Pipeline, benchmark: Benchmark, split: str, num_prompts: int, num_scenes: int) -> dict[str, Any]:
    """Returns all metrics of results.json."""
    prompts = benchmark.prompts(num_prompts) if num_prompts else []
    return {
        "bits_per_code": likelihoods(pipeline, benchmark.held_out(num_scenes)),
        benchmark.score_name: scores(pipeline, benchmark, prompts) if prompts else {},
        "split": split,
        "num_prompts": len(prompts),
        "num_scenes": num_scenes,
        "seeds": benchmark.images_per_prompt,
        "index": pipeline.index_hash(),
        "settings": dataclasses.asdict(pipeline.config),
    }


def likelihoods(pipeline: Pipeline, source: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns each method's bits per code of held-out examples, as mean and spread over ``PARTS`` parts of them.

    "gain" is how far they are below the baseline, if the baseline is measured, too. With fewer examples than parts, the
    result is empty.
    """
    bits: dict[str, list[float]] = {method: [] for method in pipeline.methods}
    for number in range(PARTS if len(source) >= PARTS else 0):
        # Parts are consecutive examples: if kinds of examples alternate, every PARTS-th one holds only a few kinds.
        part = range(number * len(source) // PARTS, (number + 1) * len(source) // PARTS)
        examples = [source[i] for i in part]
        found, scored = {}, {}  # methods share results of the same search, and distributions of the same model
        for method in pipeline.methods:
            model, policy = pipeline.model_of(method), pipeline.policy(method)
            limited, kind = METHODS[method].limited, METHODS[method].search
            search = method if limited else kind.name
            if search not in found:
                limit = functools.partial(pipeline.retriever_for, method) if limited else None
                retriever = None if kind is Search.NONE or limited else pipeline.search_of(method).retriever
                found[search] = look_up(pipeline.model, pipeline.text, examples, retriever, limit=limit)
            key = id(model), policy.blends, search
            if key not in scored:
                scored[key] = score_scenes(model, found[search], policy.blends)
            bits[method].append(bits_per_code(scored[key], functools.partial(pipeline.policy, method)))
    figures: dict[str, dict[str, Any]] = {method: mean_and_std(values) for method, values in bits.items() if values}
    for method in figures if BASELINE in figures else ():
        figures[method]["gain"] = mean_and_std(list(np.subtract(bits[BASELINE], bits[method])))
    return figures


def scores(pipeline: Pipeline, benchmark: Benchmark, prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the scores of each method, preceded by the scores of true images and of their reconstructions, if any."""
    rows = {}
    if benchmark.true_images(np.arange(1)) is not None:
        decoded = functools.partial(reconstruct, pipeline.model)
        rows["true"] = benchmark.score([_true(benchmark, len(prompts), lambda images: images)])
        rows["reconstruction"] = benchmark.score([_true(benchmark, len(prompts), decoded)])
    for method in pipeline.methods:
        rows[method] = benchmark.score(drawn(pipeline, method, prompts, benchmark.images_per_prompt))
    return rows


def drawn(pipeline: Pipeline, method: str, prompts: Sequence[str], repeats: int) -> Iterator[Iterator[ImageBatch]]:
    """Yields for each repeat an iterator over the batches of images; it generates them when it is read."""
    for repeat in range(repeats):
        seeds = pipeline.config.seed + repeat * SEED_STEP + np.arange(len(prompts))
        yield (ImageBatch(batch.numbers, batch.images) for batch in pipeline.draw(prompts, method, seeds))


def _true(
    benchmark: Benchmark, count: int, through: Callable[[UInt8[np.ndarray, "n h w 3"]], UInt8[np.ndarray, "n h w 3"]]
) -> Iterator[ImageBatch]:
    for start in range(0, count, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, count))
        images = benchmark.true_images(numbers)
        assert images is not None  # where they are asked for, prompts have some
        yield ImageBatch(numbers, through(images))


def report(results: Mapping[str, Any], benchmark: Benchmark) -> str:
    """Returns the tables that ``eval`` prints, in Markdown."""
    bits, rows = results["bits_per_code"], results[benchmark.score_name]
    tables = [bits_table(bits)] if bits else []
    return "\n\n".join([*tables, benchmark.table(rows)] if rows else tables)
