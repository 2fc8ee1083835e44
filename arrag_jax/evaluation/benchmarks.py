"""The benchmarks of ``eval``, by name; each benchmark has a folder of its own."""

import pkgutil

from arrag_jax.config import DataSetConfig
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Benchmark

# From a name to a class that takes a ``DataSetConfig`` and one of its ``splits``. A class is imported at its first use,
# so that a benchmark may need packages that the others do not.
BENCHMARKS = {
    "emoji_scenes": "arrag_jax.evaluation.emoji.benchmark:EmojiScenes",
}


def open_benchmark(name: str, data: DataSetConfig, split: str = "test") -> Benchmark:
    """Returns a benchmark over a split of its data.

    Raises:
      UserError: if the benchmark is unknown, or does not have this split.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    benchmark = pkgutil.resolve_name(BENCHMARKS[name])
    if split not in benchmark.splits:
        raise UserError(f"--split={split!r} of {name} is unknown; choose {' or '.join(benchmark.splits)}")
    return benchmark(data, split)


def prompts_of(data: DataSetConfig, number: int) -> list[str]:
    """Returns the first ``number`` test prompts of the benchmark to which a data set belongs.

    Raises:
      UserError: if the data set belongs to no benchmark.
    """
    name = data.name.partition("/")[0]
    if number and name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"config.data.name={data.name!r} has no test prompts; choose a configuration of {known}")
    return list(open_benchmark(name, data).prompts(number)) if number else []
