"""Measures checkpoints with and without retrieval.

python -m arrag_jax.eval --config configs/emoji_daid.py --benchmark emoji_scenes --workdir runs/eval

Prints tables and writes ``results.json`` into --workdir. With --sweep it looks for λ, τ and K on the validation
split instead (heat maps and ``sweep.json``); with --scaling it prints how the gain grows with the store.
"""

import dataclasses
from pathlib import Path

from arrag_jax import signals
from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig, MeshConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.emoji.benchmark import SEEDS, measure, report, scaling, sweep
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.files import require_writable, write_json

BENCHMARKS = ("emoji_scenes",)


def run(
    config: DrawConfig, workdir: str, benchmark: str, split: str, num_prompts: int, num_scenes: int, **modes: bool
) -> None:
    """Runs --benchmark on a checkpoint and its datastore; prints tables, writes results.json."""
    signals.begins_anew()
    if benchmark not in BENCHMARKS:
        raise UserError(f"--benchmark={benchmark!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    if split not in ("test", "valid"):
        raise UserError(f"--split={split!r} is unknown; choose test or valid")
    if num_scenes < SEEDS:
        raise UserError(f"--num_scenes={num_scenes} must be at least {SEEDS}, one a seed")
    if num_prompts < 0:
        raise UserError(f"--num_prompts={num_prompts} must be at least 0")
    if config.mesh not in (MeshConfig(), MeshConfig(1, 1)):
        raise UserError("eval measures on one device; leave config.mesh out")
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1))
    pipeline = open_pipeline(config, ("plain", "daid") if modes["sweep"] or modes["scaling"] else ())
    out = Path(workdir)
    require_writable(out)
    if modes["sweep"]:
        print(sweep(pipeline, num_scenes, out))
    elif modes["scaling"]:
        print(scaling(pipeline, num_scenes))
    else:
        results = measure(pipeline, split, num_prompts, num_scenes)
        write_json(out / "results.json", results)
        print(report(results))


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        benchmark=Flag("what to measure on: emoji_scenes", "emoji_scenes"),
        workdir=Flag("folder for results.json and pictures; made when absent", "runs/eval", path=True),
        split=Flag("test, or valid to choose settings on", "test"),
        num_prompts=Flag("prompts to draw, each with three seeds; 0 = likelihood alone", 600),
        num_scenes=Flag("held-out scenes whose likelihood is measured", 1500),
        sweep=Flag("look for λ, τ, K on the validation split", False),
        scaling=Flag("measure how the gain grows with the store, on the validation split", False),
    )
