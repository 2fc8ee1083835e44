"""Measures the methods of a config on a benchmark; the implementation of ``eval``."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from arrag_jax.config import DrawConfig, MeshConfig
from arrag_jax.decode.methods import BASELINE, METHODS, Search
from arrag_jax.errors import UserError
from arrag_jax.evaluation import sweeps
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.intervals import bootstrap
from arrag_jax.evaluation.kept import Kept
from arrag_jax.evaluation.likelihood import bits_of_codes, look_up, score_scenes
from arrag_jax.evaluation.memorization import are_copies
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.evaluation.run_record import method_facts
from arrag_jax.evaluation.tables import bits_table, group_tables, mean_and_std
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import Benchmark, ImageBatch
from arrag_jax.store.images import reconstruct

PARTS = 3  # parts of the held-out examples; the spread of the likelihood is the spread over these parts
SEED_STEP = 1_000_003  # added to the seeds in each repeat, so that no two images of different repeats share a key
BLOCK = 100  # true images that are scored at once
PART = 100  # held-out examples whose distributions are in memory at once
UNSEEN, TAUGHT = "unseen", "unseen_taught"  # the group that ``config.untaught_store`` holds nothing of


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
    pipelines = [open_pipeline(config), *_untaught(config)]
    require_writable(out)
    kept = Kept(out)
    results = measure(pipelines, opened, split, num_prompts, num_scenes, kept)
    write_json(out / "results.json", results)
    kept.forget()
    print(report(results, opened))


def _untaught(config: DrawConfig) -> list[Pipeline]:
    """Returns the same methods over ``config.untaught_store``, if it is given."""
    if not config.untaught_store:
        return []
    retrieval = dataclasses.replace(config.retrieval, store=config.untaught_store)
    hidden = dataclasses.replace(config.hidden, store="", cut_store="")
    names = tuple(name for name in config.methods if METHODS[name].search is not Search.CUT)
    return [open_pipeline(dataclasses.replace(config, retrieval=retrieval, hidden=hidden, methods=names))]


class Shown(NamedTuple):
    """A method's scores on P prompts.

    Attributes:
      values: what the benchmark returns.
      verdicts: float [R P], one number for each of R repeats; None if images have no score of their own.
      copied: bool [R P], whether an image copies a stored one (``memorization.are_copies``); None without a store.
    """

    values: dict[str, Any]
    verdicts: Any = None
    copied: Any = None


def measure(
    pipelines: Sequence[Pipeline],
    benchmark: Benchmark,
    split: str,
    num_prompts: int,
    num_scenes: int,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Returns all metrics of results.json.

    "methods" holds for each method the "bits" per code, "score" and share "copied" of every group of prompts, each with
    its 95 % interval over prompts.

    Args:
      pipelines: what is measured. A second one measures the group ``UNSEEN`` over a store that holds nothing of what
        these prompts ask for; the first one's figures of this group are then named ``TAUGHT``.
      kept: finished results of an interrupted measurement.
    """
    (pipeline, *others), kept = pipelines, kept or Kept(None)
    prompts = benchmark.prompts(num_prompts) if num_prompts else []
    held_out = benchmark.held_out(num_scenes)
    bits = _bits(kept, pipeline, benchmark, held_out, np.arange(len(held_out)))
    shown = scores(pipeline, benchmark, prompts, None, kept) if prompts else {}
    groups = benchmark.groups(len(held_out)), benchmark.groups(len(prompts))
    figures = by_group(bits, shown, *groups, {UNSEEN: TAUGHT} if others else {})
    for other in others:
        examples, numbers = (np.array([i for i, name in enumerate(of) if name == UNSEEN], int) for of in groups)
        bits_here = _bits(kept, other, benchmark, held_out, examples)
        shown_here = scores(other, benchmark, prompts, numbers, kept) if len(numbers) else {}
        for method, row in by_group(bits_here, shown_here, [UNSEEN] * len(examples), [UNSEEN] * len(numbers)).items():
            for figure, of in row.items():
                figures[method].setdefault(figure, {}).update(of)
    if pipeline.config.best:
        figures["best"] = figures[pipeline.config.best]
    return {
        "bits_per_code": likelihoods(bits),
        benchmark.score_name: {name: row.values for name, row in shown.items()},
        "methods": figures,
        "split": split,
        "num_prompts": len(prompts),
        "num_scenes": num_scenes,
        "seeds": benchmark.images_per_prompt,
        "index": pipeline.index_hash(),
        "settings": dataclasses.asdict(pipeline.config),
    }


def by_group(
    bits: Mapping[str, Float[np.ndarray, " N"]],
    shown: Mapping[str, Shown],
    of_examples: Sequence[str | None],
    of_prompts: Sequence[str | None],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns "methods" of results.json.

    Args:
      bits: bits per code of each example, by method.
      of_examples, of_prompts: their groups.
      renamed: names of groups in the result that differ from those of the benchmark.
    """

    def means(values: Any, groups: Sequence[str | None]) -> dict[str, dict[str, float]]:
        rows, names = np.atleast_2d(values), np.array(groups, object)
        known = dict.fromkeys(name for name in groups if name is not None)
        intervals = {name: bootstrap(rows[:, names == name].astype(np.float64)) for name in known}
        return {
            renamed.get(name, name): {"mean": mean, "low": low, "high": high}
            for name, (mean, low, high) in intervals.items()
        }

    figures: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys([*bits, *(name for name in shown if name in METHODS)]):
        row = shown.get(method, Shown({}))
        given = {"bits": bits.get(method), "score": row.verdicts, "copied": row.copied}
        figures[method] = {
            name: means(values, of_examples if name == "bits" else of_prompts)
            for name, values in given.items()
            if values is not None
        }
    return figures


def _bits(
    kept: Kept, pipeline: Pipeline, benchmark: Benchmark, source: Sequence[Mapping[str, Any]], numbers: np.ndarray
) -> dict[str, Float[np.ndarray, " N"]]:
    """Returns ``bits_of_examples`` of the examples with these numbers."""
    key = ["bits", *(_facts(pipeline, benchmark, method) for method in pipeline.methods), numbers.tolist()]
    examples = [source[i] for i in numbers.tolist()]
    make = lambda: {name: bits.tolist() for name, bits in bits_of_examples(pipeline, examples).items()}  # noqa: E731
    return {name: np.array(bits) for name, bits in kept.result(key, make).items()}


def _facts(pipeline: Pipeline, benchmark: Benchmark, method: str) -> dict[str, Any]:
    """Returns what a method's figures depend on beside the prompts or examples, as JSON values."""
    config = pipeline.config
    return {
        "method": method,
        **method_facts(pipeline, method),
        "benchmark": type(benchmark).__name__,
        "images_per_prompt": benchmark.images_per_prompt,
        "data": dataclasses.asdict(config.data),
        "sampling": dataclasses.asdict(config.sampling),
        "seed": config.seed,
        "dtype": config.dtype,
        "compared_with": pipeline.store.store_fingerprint if pipeline.store else "",  # the store of the copies
    }


def bits_of_examples(pipeline: Pipeline, source: Sequence[Mapping[str, Any]]) -> dict[str, Float[np.ndarray, " N"]]:
    """Returns the bits per code of each held-out example, by method; empty with fewer than ``PARTS`` examples."""
    bits: dict[str, list[Float[np.ndarray, " n"]]] = {method: [] for method in pipeline.methods}
    if len(source) < PARTS:
        return {}
    for part in np.array_split(np.arange(len(source)), -(-len(source) // PART)):
        examples = [source[i] for i in part.tolist()]
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
            codes = bits_of_codes(scored[key], functools.partial(pipeline.policy, method))
            bits[method].append(np.concatenate(codes).reshape(len(examples), -1).mean(1))
    return {method: np.concatenate(values) for method, values in bits.items()}


def likelihoods(bits: Mapping[str, Float[np.ndarray, " N"]]) -> dict[str, dict[str, Any]]:
    """Returns each method's bits per code as mean and spread over ``PARTS`` parts of the examples.

    "gain" is how far they are below the baseline, if the baseline is measured, too.

    Args:
      bits: result of ``bits_of_examples``.
    """
    # Parts are consecutive examples: if kinds of examples alternate, every PARTS-th one holds only a few kinds.
    parts = {
        method: [
            float(values[number * len(values) // PARTS : (number + 1) * len(values) // PARTS].mean())
            for number in range(PARTS)
        ]
        for method, values in bits.items()
    }
    figures: dict[str, dict[str, Any]] = {method: mean_and_std(values) for method, values in parts.items()}
    for method in figures if BASELINE in figures else ():
        figures[method]["gain"] = mean_and_std(list(np.subtract(parts[BASELINE], parts[method])))
    return figures


def scores(
    pipeline: Pipeline,
    benchmark: Benchmark,
    prompts: Sequence[str],
    numbers: Int[np.ndarray, " n"] | None = None,
    kept: Kept | None = None,
) -> dict[str, Shown]:
    """Returns the scores of each method; true images and their reconstructions come first, if there are any.

    Args:
      numbers: the prompts to draw, and no true images; None = all prompts.
      kept: finished results; a method's result is kept once all its images are drawn.
    """
    rows = {}
    if numbers is None and benchmark.true_images(np.arange(1)) is not None:
        decoded = functools.partial(reconstruct, pipeline.model)
        rows["true"] = _shown(benchmark.score([_true(benchmark, len(prompts), lambda images: images)]))
        rows["reconstruction"] = _shown(benchmark.score([_true(benchmark, len(prompts), decoded)]))
    chosen, kept = np.arange(len(prompts)) if numbers is None else numbers, kept or Kept(None)
    for method in pipeline.methods:
        key = ["score", _facts(pipeline, benchmark, method), [prompts[i] for i in chosen.tolist()]]
        make = functools.partial(_score, pipeline, benchmark, method, prompts, chosen)
        rows[method] = _shown(*kept.result(key, make))
    return rows


def _score(
    pipeline: Pipeline, benchmark: Benchmark, method: str, prompts: Sequence[str], chosen: Int[np.ndarray, " n"]
) -> tuple[dict[str, Any], list[list[bool]] | None]:
    """Returns a method's scores, and which of its images copy a stored one."""
    codes: list[Int[np.ndarray, "B T"]] = []
    values = benchmark.score(drawn(pipeline, method, prompts, benchmark.images_per_prompt, chosen, codes.append))
    if pipeline.store is None:
        return values, None
    grids = np.concatenate(codes).reshape(-1, *pipeline.model.grid)
    return values, are_copies(grids, pipeline.store.shown_codes).reshape(-1, len(chosen)).tolist()


def _shown(values: dict[str, Any], copied: Any = None) -> Shown:
    verdicts = values.get("verdicts")
    return Shown(values, *(None if rows is None else np.asarray(rows, np.float64) for rows in (verdicts, copied)))


def drawn(
    pipeline: Pipeline,
    method: str,
    prompts: Sequence[str],
    repeats: int,
    numbers: Int[np.ndarray, " n"],
    note: Callable[[Int[np.ndarray, "B T"]], Any],
) -> Iterator[Iterator[ImageBatch]]:
    """Yields for each repeat an iterator over the batches of images; it generates them when it is read.

    Args:
      numbers: the prompts to draw.
      note: is called with the codes of each batch.
    """

    def batches(seeds: Int[np.ndarray, " n"]) -> Iterator[ImageBatch]:
        for batch in pipeline.draw([prompts[i] for i in numbers.tolist()], method, seeds):
            note(np.asarray(batch.drawn.codes))
            yield ImageBatch(numbers[batch.numbers], batch.images)

    for repeat in range(repeats):
        yield batches(pipeline.config.seed + repeat * SEED_STEP + numbers)


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
    return "\n\n".join([*tables, *([benchmark.table(rows)] if rows else []), *group_tables(results["methods"])])
