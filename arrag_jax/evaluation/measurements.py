"""Figures over prompts with their intervals, the record ``results.json`` of a run, and how two runs are compared."""

import hashlib
import importlib.metadata
import json
import platform
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from arrag_jax.errors import UserError
from arrag_jax.evaluation.intervals import interval, resampled_means
from arrag_jax.figures import grids
from arrag_jax.interfaces import Figure, Measurement
from arrag_jax.json_files import read_object

RESULTS = "results.json"
MADE_BY, VERSION = "arrag_jax.eval", 1
# Packages whose versions results.json holds, if they are loaded.
PACKAGES = {
    "jax": "jax", "jaxlib": "jaxlib", "numpy": "numpy", "pillow": "PIL", "onnxruntime": "onnxruntime", "torch": "torch",
    "transformers": "transformers",
}  # fmt: skip
Values = Mapping[str, Mapping[str, Sequence[float]]]


def figure_of(values: Values, parts: Sequence[str], scale: float = 1.0) -> Figure:
    """Returns the unweighted mean over parts of each part's mean over prompts, with its 95 % interval over prompts.

    Args:
      values: as in ``Measurement``.
      parts: keys of it; one without prompts gives a figure without a value.
      scale: factor of the mean.
    """
    if not all(values.get(part) for part in parts):
        return Figure(None, parts=tuple(parts), scale=scale)
    columns = {part: _columns(values[part], list(values[part])) for part in parts}
    value = float(np.mean([np.average(x, weights=w) for x, w in columns.values()]))
    means = np.mean([resampled_means(x, w, _seed(part)) for part, (x, w) in columns.items()], 0)
    low, high = interval(scale * means)
    return Figure(scale * value, low, high, tuple(parts), scale)


def _columns(
    part: Mapping[str, Sequence[float]], names: Sequence[str]
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    pairs = np.array([tuple(part[name])[:2] for name in names], float)
    return pairs[:, 0], pairs[:, 1]


def _seed(part: str) -> int:
    """Returns the seed of a part's resampling: prompts of different parts are drawn independently."""
    return zlib.crc32(part.encode())


def record_of(
    benchmark: str, protocol: Mapping[str, Any], images: Mapping[str, Any], measured: Measurement
) -> dict[str, Any]:
    """Returns the content of results.json.

    Args:
      protocol: everything that the figures depend on beside the images.
      images: which images were scored: ``copies``, ``missing``, ``drawn``, the settings in ``run.json``, and ``audit``,
        in which store copies were looked for.
    """
    versions = {name: importlib.metadata.version(name) for name, module in PACKAGES.items() if module in sys.modules}
    device = jax.devices()[0]
    record = {
        "made_by": MADE_BY,
        "version": VERSION,
        "benchmark": benchmark,
        "protocol": protocol,
        "protocol_hash": protocol_hash(benchmark, protocol),
        "images": images,
        "versions": {"python": platform.python_version(), "arrag_jax": _own_version(), **versions},
        "device": f"{jax.local_device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}",
        "figures": {name: figure._asdict() for name, figure in measured.figures.items()},
        "notes": list(measured.notes),
        "values": measured.values,
    }
    return json.loads(json.dumps(record))


def _own_version() -> str:
    import arrag_jax

    return arrag_jax.__version__


def protocol_hash(benchmark: str, protocol: Mapping[str, Any]) -> str:
    """Returns the identity of a way to measure, 16 hex digits; figures of different ones cannot be compared."""
    text = json.dumps([benchmark, protocol], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table of runs by their names: one row per figure, with its interval."""
    names = list(dict.fromkeys(name for record in records.values() for name in record["figures"]))
    rows = [[name, *(shown(record["figures"].get(name)) for record in records.values())] for name in names]
    first = next(iter(records.values()))
    return grids.table([f"{first['benchmark']}, with 95 % intervals", *records], rows, digits=4)


def shown(figure: Mapping[str, Any] | None) -> str:
    """Returns a figure as text."""
    if figure is None or figure["value"] is None:
        return "not scored"
    if figure["low"] is None:
        return f"{figure['value']:.4g}"
    return f"{figure['value']:.4g} [{figure['low']:.4g}, {figure['high']:.4g}]"


def read_results(folder: str) -> dict[str, Any]:
    """Returns the record of a run in a folder.

    Raises:
      UserError: if the folder has no results.json, or it is not one of a benchmark over a folder of images.
    """
    path = Path(folder) / RESULTS
    record = read_object(path)
    wanted = {"benchmark": str, "protocol": dict, "protocol_hash": str, "images": dict, "figures": dict, "values": dict}
    if record.get("made_by") != MADE_BY or not all(isinstance(record.get(k), kind) for k, kind in wanted.items()):
        raise UserError(f"{path} is no result of a benchmark over a folder of images; measure that folder again")
    return record


def compare(first: str, second: str) -> str:
    """Returns a Markdown table of the figures of two folders, and of their differences, paired over prompts.

    Raises:
      UserError: if the two were not measured in the same way, or have no prompt in common.
    """
    a, b = read_results(first), read_results(second)
    if a["protocol_hash"] != b["protocol_hash"]:
        keys = {**a["protocol"], **b["protocol"]}
        names = [key for key in keys if a["protocol"].get(key) != b["protocol"].get(key)]
        names = ["benchmark"] if a["benchmark"] != b["benchmark"] else names
        raise UserError(f"{first} and {second} were not measured in the same way: {', '.join(names)} differ")
    rows, notes = [], list(dict.fromkeys([*a["notes"], *b["notes"]]))
    stores = [(record["images"].get("audit") or {}).get("fingerprint") for record in (a, b)]
    if None not in stores and stores[0] != stores[1]:
        notes.append("copies were looked for in different stores")
    for name in a["figures"].keys() & b["figures"].keys():
        before, after = (shown(record["figures"][name]) for record in (a, b))
        rows.append([name, before, after, *difference(a, b, name)])
    order = list(a["figures"])
    rows.sort(key=lambda row: order.index(row[0]))
    head = [a["benchmark"], first, second, "difference", "beyond its interval"]
    return "\n".join([grids.table(head, rows, digits=4), *(f"note: {note}" for note in notes)])


def difference(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Returns by how much a figure of ``b`` exceeds that of ``a``, with its interval, and whether this leaves out 0.

    Raises:
      UserError: if the two have no prompt in common.
    """
    figure, other = (Figure(**record["figures"][name]) for record in (a, b))
    if figure.value is None or other.value is None:
        return "", ""
    if not figure.parts:  # not a mean over prompts: nothing can be paired
        apart = None not in (figure.low, other.low) and (figure.low > other.high or other.low > figure.high)  # type: ignore[operator]  # None is excluded
        return f"{other.value - figure.value:+.4g}", "yes, not paired" if apart else "unknown, not paired"
    means, values = [], []
    for part in figure.parts:
        names = [each for each in a["values"][part] if each in b["values"][part]]
        if not names:
            raise UserError(f"the two runs have no prompt of {part} in common; compare runs of one prompt set")
        old, new = (_columns(record["values"][part], names) for record in (a, b))
        values.append(np.average(new[0], weights=new[1]) - np.average(old[0], weights=old[1]))
        means.append(resampled_means(*new, _seed(part)) - resampled_means(*old, _seed(part)))
    low, high = interval(figure.scale * np.mean(means, 0))
    text = f"{figure.scale * float(np.mean(values)):+.4g} [{low:+.4g}, {high:+.4g}]"
    return text, "no" if low <= 0 <= high else "yes"
