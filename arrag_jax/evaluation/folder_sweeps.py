"""Measures a benchmark over a folder of images for several values of λ, τ and K, each with several seeds.

Every setting and seed has a folder of its own, so a sweep that is interrupted continues at every image, and any two of
its folders can be compared. Plain drawing with the same seeds stands beside them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.config import DaidConfig, DrawConfig, HiddenConfig, RetrievalConfig
from arrag_jax.decode.methods import METHODS, Search
from arrag_jax.errors import UserError
from arrag_jax.evaluation import measurements
from arrag_jax.evaluation.drawn_folder import draw_folder
from arrag_jax.evaluation.folder_runs import Scorer, Steps
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures import grids
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import Figure, FolderBenchmark
from arrag_jax.work import HERE, Engine

BASELINE, RESULTS = "plain", "sweep.json"
FLAGS = {"weight": "sweep_weights", "temperature": "sweep_temperatures", "k": "sweep_neighbors"}
KINDS = {"weight": float, "temperature": float, "k": int}
Setting = Mapping[str, float]


def settings_of(given: Mapping[str, str]) -> list[Setting]:
    """Returns every combination of the values, K changing slowest.

    Args:
      given: from "weight", "temperature" and "k" to the values, separated by commas; "" = the config's own.

    Raises:
      UserError: if there are no values, or one is no number.
    """
    axes: dict[str, list[float]] = {}
    for name in ("k", "weight", "temperature"):
        try:
            axes |= {name: [KINDS[name](word) for word in given[name].split(",")]} if given[name] else {}
        except ValueError:
            raise UserError(f"--{FLAGS[name]}={given[name]!r} are no numbers; separate them by commas") from None
    if not axes:
        raise UserError(
            f"--sweep needs values; give at least one of {', '.join(f'--{flag}' for flag in FLAGS.values())}"
        )
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def with_setting(config: Any, setting: Setting) -> Any:
    """Returns a config, or a part of it, with these λ and τ for every method and this K for every search."""
    if not dataclasses.is_dataclass(config):
        return config
    own = {DaidConfig: ("weight", "temperature"), RetrievalConfig: ("k",), HiddenConfig: ("k",)}.get(type(config), ())
    changed = {
        field.name: setting[field.name]
        if field.name in own and field.name in setting
        else with_setting(getattr(config, field.name), setting)
        for field in dataclasses.fields(config)
    }
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]  # an instance


def require_swept(config: DrawConfig, method: str, settings: Sequence[Setting]) -> None:
    """Raises UserError if a method is unknown, or does not depend on the settings."""
    if method not in METHODS:
        raise UserError(f"--sweep needs a --method that retrieves, not {method!r}")
    if METHODS[method].search is Search.NONE:
        raise UserError(f"--method={method} does not retrieve: it has no λ, τ and K; choose another one for --sweep")
    for name in settings[0].keys() - {"k"}:
        policies = [METHODS[method].policy(with_setting(config, {name: value})) for value in (0.25, 0.5)]
        if dataclasses.asdict(policies[0]) == dataclasses.asdict(policies[1]):  # type: ignore[call-overload]  # all are
            raise UserError(f"--method={method} has no {name}; leave out --{FLAGS[name]}")


def sweep(
    config: DrawConfig | None,
    workdir: str,
    name: str,
    benchmark: FolderBenchmark,
    method: str,
    given: Mapping[str, str],
    seeds: int,
    steps: Steps,
    engine: Engine = HERE,
) -> None:
    """Draws and scores a benchmark with each setting and seed; prints one table and writes sweep.json.

    Args:
      name: of the benchmark.
      given: as in ``settings_of``.
      seeds: number of seeds, from ``config.seed`` on.

    Raises:
      UserError: if nothing can be swept; as ``folder_runs.run``.
    """
    if config is None:
        raise UserError("missing --config (see --help)")
    if not (steps.draw and steps.score) or seeds < 1:
        raise UserError("--sweep draws and scores, with at least one seed; leave out --draw_only and --score_only")
    settings = settings_of(given)
    require_swept(config, method, settings)
    _ = [with_setting(config, setting) for setting in settings]  # raises if a value is none
    scorer = Scorer.of(name, benchmark, steps, config, engine)
    require_writable(Path(workdir))
    rows: dict[str, Row] = {}
    for label, setting, drawn_by, pipeline in _pipelines(config, method, settings):
        records = []
        for seed in range(config.seed, config.seed + seeds):
            folder = Path(workdir) / label / f"seed{seed}"
            changed = dataclasses.replace(with_setting(config, setting), seed=seed)
            seeded = dataclasses.replace(pipeline, config=changed)
            draw_folder(seeded, drawn_by, benchmark, folder, engine, steps.known_words, steps.found_in)
            if engine.leads:
                records.append(scorer.kept(folder) or scorer.score(folder))
        if engine.leads:
            rows[label] = Row.of(setting, records)
    if not engine.leads:
        return
    contents = {label: row.content() for label, row in rows.items()}
    write_json(Path(workdir) / RESULTS, {"benchmark": name, "method": method, "seeds": seeds, "rows": contents})
    print(table(name, method, seeds, rows))
    for note in dict.fromkeys(note for row in rows.values() for note in row.record["notes"]):
        print(f"note: {note}")


def _pipelines(config: DrawConfig, method: str, settings: Sequence[Setting]) -> Iterator[tuple[str, Setting, str, Any]]:
    """Yields label, setting, method and pipeline of each row, the baseline first; one pipeline serves a whole K."""
    yield BASELINE, {}, BASELINE, open_pipeline(config, [BASELINE], alone=True)
    for _, group in itertools.groupby(settings, lambda setting: setting.get("k")):
        same = list(group)
        pipeline = open_pipeline(with_setting(config, same[0]), [method], alone=True)
        for setting in same:
            yield "_".join(f"{key}{value:g}" for key, value in setting.items()), setting, method, pipeline


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
      record: its runs as one, in the form of results.json: a prompt's value is the mean over seeds.
      seeds: the values of each figure, by seed.
    """

    setting: Setting
    record: dict[str, Any]
    seeds: dict[str, list[float]]

    @classmethod
    def of(cls, setting: Setting, records: Sequence[Mapping[str, Any]]) -> "Row":
        """Returns the row of the results of some seeds."""
        values: dict[str, dict[str, tuple[float, float]]] = {}
        for part in records[0]["values"]:
            values[part] = {}
            for prompt in records[0]["values"][part]:
                pairs = np.array([r["values"][part][prompt] for r in records if prompt in r["values"].get(part, {})])
                weight = float(pairs[:, 1].sum())
                mean = float(pairs.prod(1).sum()) / weight if weight else 0.0
                values[part][prompt] = (mean, weight)
        figures, seeds = {}, {}
        for name, figure in records[0]["figures"].items():
            found = [record["figures"].get(name, {}).get("value") for record in records]
            if any(value is None for value in found):
                continue
            seeds[name] = found
            is_mean = figure["parts"] and all(values.get(part) for part in figure["parts"])
            merged = measurements.figure_of(values, tuple(figure["parts"]), figure["scale"]) if is_mean else None
            figures[name] = (merged or Figure(float(np.mean(found))))._asdict()
        notes = dict.fromkeys(note for record in records for note in record["notes"])
        return cls(setting, {"figures": figures, "values": values, "notes": list(notes)}, seeds)

    def content(self) -> dict[str, Any]:
        """Returns what sweep.json holds of it."""
        return {"setting": dict(self.setting), "figures": self.record["figures"], "by_seed": self.seeds}


def table(name: str, method: str, seeds: int, rows: Mapping[str, Row]) -> str:
    """Returns a Markdown table: per setting the benchmark's first figure, its spread over seeds, and other figures."""
    baseline = rows[BASELINE].record
    first = next((x for x in baseline["figures"] if all(x in row.record["figures"] for row in rows.values())), None)
    if first is None:
        raise UserError(f"{name} gave no figure that all runs have; the folders' results.json say why")
    others = [x for x in ("copied", "copied, also moved") if any(x in row.record["figures"] for row in rows.values())]
    keys = list(list(rows.values())[-1].setting)
    lines = []
    for label, row in rows.items():
        figure = row.record["figures"][first]
        spread = float(np.std(row.seeds[first], ddof=1)) if seeds > 1 else None
        change = ("", "") if label == BASELINE else measurements.difference(baseline, row.record, first)
        rest = [measurements.shown(row.record["figures"].get(x)) for x in others]
        setting = [row.setting[key] for key in keys] if row.setting else [BASELINE, *[""] * (len(keys) - 1)]
        lines.append([*setting, measurements.shown(figure), spread, *change, *rest])
    head = [{"weight": "λ", "temperature": "τ", "k": "K"}[key] for key in keys]
    spread_name = f"± over {seeds} seeds"
    head += [f"{name}, {method}: {first}", spread_name, "minus plain", "beyond its interval", *others]
    return grids.table(head, lines, digits=4)
