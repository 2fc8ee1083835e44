"""Measures the quality of checkpoints with and without retrieval, or of a folder of images.

python -m arrag_jax.eval --config configs/emoji_daid.py --benchmark emoji_scenes --workdir runs/eval

Prints tables and writes ``results.json`` into --workdir. With --sweep it searches for the best λ, τ and K on the
validation split instead, and writes heat maps and ``sweep.json``. With --scaling it measures how the gain depends on
the size of the store instead. With --fit_gate it fits the gate of method "gated+caption" on drawn images
(docs/keys.md).

Benchmarks over a prompt set draw it into a folder first, and can be continued at every image (docs/benchmarks.md):

python -m arrag_jax.eval --config configs/emoji_daid.py --benchmark geneval --prompts evaluation_metadata.jsonl \\
  --detector onnx:yolox.onnx --method plain --workdir runs/geneval

With --sweep, every combination of --sweep_weights, --sweep_temperatures and --sweep_neighbors is drawn and scored with
several seeds.

--draw_only leaves out the scoring. --score_only scores what is in --workdir, without a config; another program may have
drawn it. With --ray a Ray cluster draws the images and computes their features, see docs/clusters.md.
``--compare OUT1 OUT2`` prints two finished runs side by side and needs nothing else.
"""

from collections.abc import Sequence
from typing import Any

import jax

from arrag_jax.command import OPTIONAL_CONFIG, RAY, RAY_CORES, Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.decode.methods import METHODS
from arrag_jax.errors import UserError
from arrag_jax.evaluation import folder_runs, folder_sweeps, gate_fit, measurements
from arrag_jax.evaluation.benchmarks import (
    BENCHMARKS,
    benchmark_flags,
    is_folder_benchmark,
    open_folder_benchmark,
)
from arrag_jax.evaluation.dry_run import PATCHES, dry_run_of_drawing
from arrag_jax.evaluation.measure import evaluate
from arrag_jax.topology import TOPOLOGY
from arrag_jax.work import open_engine

SEEDS = 3


def run(
    config: DrawConfig | None,
    workdir: str,
    benchmark: str,
    split: str,
    num_prompts: int,
    num_scenes: int,
    sweep: bool,
    scaling: bool,
    prompts: str = "",
    copies: int = 0,
    limit: int = 0,
    method: str = "",
    draw_only: bool = False,
    score_only: bool = False,
    allow_missing: bool = False,
    known_words: bool = False,
    copies_of: str = "",
    sweep_weights: str = "",
    sweep_temperatures: str = "",
    sweep_neighbors: str = "",
    sweep_seeds: int = SEEDS,
    fit_gate: bool = False,
    compare: Sequence[str] = (),
    ray: str = "",
    ray_cores: int = RAY_CORES.default,
    **flags: Any,
) -> None:
    """Runs --benchmark; prints tables and writes results.json. ``flags``: those of ``benchmark_flags``."""
    if compare:
        _compare(compare)
        return
    if is_folder_benchmark(benchmark):
        if scaling or fit_gate:
            raise UserError(f"{benchmark} has no examples for --scaling and --fit_gate; leave them out")
        if score_only:
            prompts, copies, limit = folder_runs.drawn_from(workdir, prompts, copies, limit)
        opened = open_folder_benchmark(benchmark, prompts, copies, limit, flags)
        place = folder_runs.place_of(prompts, limit)
        steps = folder_runs.Steps(not score_only, not draw_only, allow_missing, known_words, copies_of, place)
        with open_engine(ray, ray_cores) as engine:
            if sweep:
                given = {"weight": sweep_weights, "temperature": sweep_temperatures, "k": sweep_neighbors}
                what = config, workdir, benchmark, opened, method or "daid", given, sweep_seeds
                folder_sweeps.sweep(*what, steps, engine)
            else:
                folder_runs.run(config, workdir, benchmark, opened, method, steps, engine)
        return
    if draw_only or score_only or prompts or method:
        raise UserError(f"{benchmark} draws its own prompts and keeps no images; leave out the flags of prompt sets")
    if config is None:
        raise UserError("missing --config (see --help)")
    _require_one_process(benchmark, ray)
    if fit_gate:
        gate_fit.fit_gate(config, workdir, benchmark, num_prompts)
        return
    evaluate(config, workdir, benchmark, split, num_prompts, num_scenes, sweep, scaling)


def run_or_compile(
    config: DrawConfig | None, workdir: str, topology: str, patches: int, method: str, **flags: Any
) -> int | None:
    """Compiles what the config draws for --topology if that is given, else does the same as ``run``."""
    if topology:
        return dry_run_of_drawing(config, method, topology, patches, workdir)
    run(config, workdir, method=method, **flags)
    return None


def _require_one_process(benchmark: str, ray: str) -> None:
    if ray:
        raise UserError(f"{benchmark} is measured in one process; --ray is for benchmarks over a prompt set")
    if jax.process_count() > 1:
        raise UserError(
            f"{benchmark} is measured in one process; start it once, without JAX_COORDINATOR_ADDRESS and the like"
        )


def _compare(folders: Sequence[str]) -> None:
    if len(folders) != 2:
        raise UserError(f"--compare needs two folders, and {len(folders)} are given: --compare OUT1 OUT2")
    print(measurements.compare(*folders))


if __name__ == "__main__":
    own: Any = benchmark_flags()
    main_with_config(
        run_or_compile,
        DrawConfig,
        "apart",
        config=OPTIONAL_CONFIG,
        benchmark=Flag(f"what to measure on, one of {', '.join(BENCHMARKS)}", "emoji_scenes"),
        workdir=Flag("folder for results.json and images; made when absent", "runs/eval", path=True, storage=True),
        split=Flag("test, or valid to choose settings on", "test"),
        num_prompts=Flag("prompts to draw, each with the benchmark's number of seeds; 0 = likelihood alone", 600),
        num_scenes=Flag("held-out images whose likelihood is measured", 1500),
        sweep=Flag("look for λ, τ, K: on the validation split, or of a prompt set for the values below", False),
        sweep_weights=Flag("values of λ for --sweep over a prompt set, separated by commas; empty: the config's", ""),
        sweep_temperatures=Flag("values of τ", ""),
        sweep_neighbors=Flag("values of K", ""),
        sweep_seeds=Flag("seeds that --sweep draws with each of them", SEEDS),
        scaling=Flag("measure how the gain grows with the store, on the validation split", False),
        fit_gate=Flag("fit the gate of config.hidden.gated_caption on drawn images, at a bound on copying", False),
        prompts=Flag(
            "prompt set: .jsonl, .json, .csv, .txt, or a folder of .txt files; --score_only knows that of its folder",
            "",
            path=True,
        ),
        copies=Flag("images per prompt of a prompt set; 0 = the benchmark's own number", 0),
        limit=Flag("use the first N prompts of the set alone; 0 = all", 0),
        method=Flag(f"draw one method into --workdir itself, one of {', '.join(METHODS)}; default: all, below it", ""),
        draw_only=Flag("draw the prompt set and score nothing", False),
        score_only=Flag("score the images that are in --workdir, and draw nothing", False),
        allow_missing=Flag("score a folder that lacks images; they are counted and named", False),
        known_words=Flag("draw only the words of a prompt that a model of few words knows, and no error", False),
        copies_of=Flag(
            "datastore in which copies are looked for, or none; default: that of the method or the config",
            "",
            path=True,
        ),
        topology=TOPOLOGY,
        patches=PATCHES,
        compare=Flag(
            "folder of a finished run; give two, and their figures are compared prompt by prompt",
            (),
            path=True,
            several=True,
        ),
        ray=RAY,
        ray_cores=RAY_CORES,
        **own,
    )
