"""The benchmarks of ``eval``, by name; each benchmark has a folder of its own."""

import pkgutil
from collections.abc import Mapping
from typing import Any

from arrag_jax.command import Flag
from arrag_jax.config import DataSetConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.prompt_sets import read_prompts
from arrag_jax.interfaces import Benchmark, FolderBenchmark

# From a name to a class: a ``FolderBenchmark`` has ``flags`` and takes their values; a ``Benchmark`` takes a
# ``DataSetConfig`` and one of its ``splits``. Packages that one benchmark alone needs are imported where they are used.
BENCHMARKS = {
    "emoji_scenes": "arrag_jax.evaluation.emoji.benchmark:EmojiScenes",
    "geneval": "arrag_jax.evaluation.geneval.benchmark:GenEval",
    "dpg": "arrag_jax.evaluation.dpg.benchmark:DpgBench",
    "distances": "arrag_jax.evaluation.distances.benchmark:Distances",
}

FIRST = 12  # prompts of a group are looked for among so many times the requested number


def open_benchmark(name: str, data: DataSetConfig, split: str = "test") -> Benchmark:
    """Returns a benchmark over a split of its data.

    Raises:
      UserError: if the benchmark is unknown, or does not have this split.
    """
    benchmark = class_of(name)
    if split not in benchmark.splits:
        raise UserError(f"--split={split!r} of {name} is unknown; choose {' or '.join(benchmark.splits)}")
    return benchmark(data, split)


def open_folder_benchmark(
    name: str, prompts: str, copies: int = 0, limit: int = 0, given: Mapping[str, Any] | None = None
) -> FolderBenchmark:
    """Returns a benchmark over a prompt set.

    Args:
      name: of a benchmark with flags.
      prompts: file or folder of the prompt set, as ``prompt_sets.read_prompts`` reads it.
      copies: images per prompt; 0 = the benchmark's own number.
      limit: use the first prompts alone; 0 = all.
      given: values of the benchmark's flags; flags that are left out have their defaults.

    Raises:
      UserError: if the prompt set cannot be read, or a flag is given that belongs to other benchmarks alone.
    """
    benchmark = class_of(name)
    values = {flag: default for flag, (_, default, *_) in benchmark.flags.items()}
    for flag, value in (given or {}).items():
        if flag not in values and value != benchmark_flags()[flag].default:
            raise UserError(f"--{flag} is no flag of {name}, which has {', '.join(f'--{own}' for own in values)}")
    values |= {flag: value for flag, value in (given or {}).items() if flag in values}
    for flag, value in {"copies": copies, "limit": limit}.items():
        if value < 0:
            raise UserError(f"--{flag}={value} must be at least 0")
    if not prompts:
        raise UserError(f"{name} needs a prompt set; give the path of its file or folder as --prompts")
    return benchmark(prompts=read_prompts(prompts, limit), copies=copies, **values)


def class_of(name: str) -> Any:
    """Returns the class of a benchmark.

    Raises:
      UserError: if the benchmark is unknown.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    return pkgutil.resolve_name(BENCHMARKS[name])


def is_folder_benchmark(name: str) -> bool:
    """Returns whether a benchmark scores a folder of images. Raises UserError if the benchmark is unknown."""
    return hasattr(class_of(name), "flags")


def benchmark_flags() -> dict[str, Flag]:
    """Returns the flags that benchmarks add to ``eval``; flags of one name mean the same in every benchmark."""
    return {name: flag for key in BENCHMARKS for name, flag in getattr(class_of(key), "flags", {}).items()}


def prompts_of(data: DataSetConfig, number: int, group: str = "") -> list[str]:
    """Returns the first ``number`` test prompts of the benchmark to which a data set belongs.

    Args:
      group: only prompts of this group (``Benchmark.groups``); "" = all.

    Raises:
      UserError: if the data set belongs to no benchmark, or none of the first prompts is of the group.
    """
    name = data.source.partition("/")[0]
    if number and (name not in BENCHMARKS or is_folder_benchmark(name)):
        known = ", ".join(key for key in BENCHMARKS if not is_folder_benchmark(key))
        raise UserError(f"config.data.source={data.source!r} has no test prompts; choose a configuration of {known}")
    if not number:
        return []
    benchmark = open_benchmark(name, data)
    if not group:
        return list(benchmark.prompts(number))
    many = FIRST * number
    of = list(zip(benchmark.prompts(many), benchmark.groups(many), strict=True))
    chosen = [text for text, its in of if its == group][:number]
    if not chosen:
        groups = ", ".join(sorted({str(its) for _, its in of if its is not None}))
        raise UserError(f"--test_group={group!r} has no prompt; choose one of {groups}")
    return chosen
