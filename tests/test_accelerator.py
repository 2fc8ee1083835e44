"""Laws of the table of all speeds: counts follow from the model's shape, and rows without time are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "accelerator.py"


@pytest.mark.long
@pytest.mark.slow
def test_every_row_stands_beside_the_least_that_it_does(tmp_path):
    words = [sys.executable, str(BENCHMARK), "--shape=tiny", "--tables=decode", f"--out={tmp_path}"]
    subprocess.run(words, check=True, capture_output=True, timeout=600)
    record, shown = json.loads((tmp_path / "accelerator.json").read_text()), (tmp_path / "accelerator.md").read_text()
    rates, rows = record["device"], {row["row"]: row for row in record["rows"]}
    assert record["left_out"] == []
    assert set(rows) == {f"{name}, 1 images" for name in ("plain", "plain, int8", "DAiD, dense", "hidden, dense")}
    for name, row in rows.items():
        least = max(row["flops"] / rates["flops"], row["bytes"] / rates["bytes"])
        assert row["least_seconds"] == pytest.approx(least)
        assert row["of_least"] == pytest.approx(row["seconds"] / least)
        assert name in shown
    # Of the embedded shape: 6 layers of 192 channels, one image with guidance (2 rows), 31 + 144 slots of cache.
    layers, head, aligner = 6 * (4 * 192**2 + 3 * 192 * 512), 192**2 + 192 * 512, 8 * 192 + 192**2
    scores = 6 * 2 * 2 * 175 * 192  # products of queries with keys, and of their shares with values
    plain = rows["plain, 1 images"]
    assert plain["flops"] == 2 * 2 * (layers + head + aligner) + 2 * scores
    cache = 6 * 2 * 2 * 175 * 192 * 4
    small = 13 * 192 + 192 + 512 + 2 * 192  # norms and biases
    assert plain["bytes"] == 4 * (layers + head + aligner + small) + cache
    # In int8 a number takes one byte instead of four, and each output has a scale.
    outputs = 6 * (4 * 192 + 2 * 512 + 192)
    assert plain["bytes"] - rows["plain, int8, 1 images"]["bytes"] == 3 * layers - 4 * outputs
    # DAiD also reads 8 bytes per context and where its patches begin.
    assert rows["DAiD, dense, 1 images"]["bytes"] - plain["bytes"] == 2000 * 8 + 2001 * 4
    hidden = 2000 // 144 * 144  # whole images of keys of 64 bytes, and their codes
    assert rows["hidden, dense, 1 images"]["bytes"] - plain["bytes"] == hidden * (64 + 4)
    assert rows["hidden, dense, 1 images"]["flops"] - plain["flops"] == 2 * hidden * 64


@pytest.mark.slow
def test_rows_without_time_are_named():
    """In a process of its own, because benchmarks define flags of their own."""
    code = """import accelerator, json, rooflines
tables = ["tokenizer", "faid"]
print(json.dumps(accelerator.measured(accelerator.SHAPES["tiny"], tables, rooflines.Rates("none", 1, 1, ""), 0)))"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARK.parent, env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    names = ("tokenizer: encode", "tokenizer: decode", "faid: without blenders", "faid: FAiD")
    assert json.loads(done.stdout) == [[], [f"{name} (no time)" for name in names]]
