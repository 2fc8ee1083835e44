"""Progress bars appear on a terminal alone, and all come from one place."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrag_jax import progress

ROOT = Path(__file__).resolve().parents[1]


class Terminal:
    """A stderr that says what it is."""

    def __init__(self, is_terminal: bool):
        self._is_terminal, self.text = is_terminal, ""

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.fixture
def bars() -> Iterator[None]:
    yield
    progress.show(True)


@pytest.mark.parametrize(("is_terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_bars_appear_on_a_terminal_alone_and_only_where_wanted(monkeypatch, bars, is_terminal, wanted):
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    progress.show(wanted)
    assert list(progress.bar(range(3), desc="working")) == [0, 1, 2]
    assert ("working" in sys.stderr.text) == (is_terminal and wanted)


def test_every_bar_comes_from_one_place():
    own = [path.name for path in (ROOT / "arrag_jax").rglob("*.py") if "tqdm import" in path.read_text()]
    assert own == ["progress.py"]
