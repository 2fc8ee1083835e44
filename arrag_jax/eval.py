"""Measures the quality of checkpoints with and without retrieval.

python -m arrag_jax.eval --config configs/emoji_daid.py --benchmark emoji_scenes --workdir runs/eval

Prints tables and writes ``results.json`` into --workdir. With --sweep it searches for the best λ, τ and K on the
validation split instead, and writes heat maps and ``sweep.json``. With --scaling it measures how the gain depends on
the size of the store instead.
"""

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.evaluation.benchmarks import BENCHMARKS
from arrag_jax.evaluation.measure import evaluate


def run(
    config: DrawConfig,
    workdir: str,
    benchmark: str,
    split: str,
    num_prompts: int,
    num_scenes: int,
    sweep: bool,
    scaling: bool,
) -> None:
    """Runs --benchmark on a checkpoint and its datastore; prints tables and writes results.json."""
    evaluate(config, workdir, benchmark, split, num_prompts, num_scenes, sweep, scaling)


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        benchmark=Flag(f"what to measure on, one of {', '.join(BENCHMARKS)}", "emoji_scenes"),
        workdir=Flag("folder for results.json and images; made when absent", "runs/eval", path=True),
        split=Flag("test, or valid to choose settings on", "test"),
        num_prompts=Flag("prompts to draw, each with the benchmark's number of seeds; 0 = likelihood alone", 600),
        num_scenes=Flag("held-out images whose likelihood is measured", 1500),
        sweep=Flag("look for λ, τ, K on the validation split", False),
        scaling=Flag("measure how the gain grows with the store, on the validation split", False),
    )
