"""Statistics over repeats, and the table that all benchmarks share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arrag_jax.figures import grids


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Returns mean and sample standard deviation of one metric over repeats; the deviation of a single value is 0."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def bits_table(bits: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the methods' bits per code, and how far they are below the baseline."""
    nothing = {"mean": None, "std": None}
    return grids.table(
        ["bits per code", "mean", "spread", "below plain", "spread"],
        [[name, row["mean"], row["std"], *row.get("gain", nothing).values()] for name, row in bits.items()],
        digits=4,
    )


def group_tables(methods: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> list[str]:
    """Returns a Markdown table for each figure of "methods" in results.json: by group, mean [95 % interval]."""
    tables = []
    for figure in dict.fromkeys(figure for row in methods.values() for figure in row):
        rows = {name: row.get(figure, {}) for name, row in methods.items()}
        groups = list(dict.fromkeys(group for row in rows.values() for group in row))
        if groups:
            cells = [[name, *(interval_text(row.get(group)) for group in groups)] for name, row in rows.items()]
            tables.append(grids.table([figure, *groups], cells))
    return tables


def interval_text(interval: Mapping[str, float] | None) -> str:
    """Returns a mean with its interval, as a cell of a table; empty without a figure."""
    return "" if interval is None else f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
