"""docs/tutorial.ipynb runs from top to bottom, is committed with what it printed and drew, and is small."""

import json
from pathlib import Path

import pytest

from helpers import children

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


def cells(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells(notebook) for output in cell["outputs"])


def test_its_outputs_are_committed():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size <= 2**20
    assert [cell["execution_count"] for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    assert pictures(notebook) == 3


@pytest.mark.long
@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    for name, value in children.alone().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in cells(notebook):
        cell["outputs"] = []
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == 3
