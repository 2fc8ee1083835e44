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
