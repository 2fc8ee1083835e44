"""Runs a command of the package within the test's own process, which saves it the imports."""

import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> Done:
    """Runs ``python -m arrag_jax.COMMAND ARGUMENTS``."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    with warnings.catch_warnings(action="ignore"), pytest.raises(SystemExit) as end:
        # runpy warns that the module is imported already
        runpy.run_module(f"arrag_jax.{command}", run_name="__main__")
    return Done(end.value.code or 0, *capsys.readouterr())


def assert_one_line(done: Done, *words: str) -> None:
    """The command ended with an error in one line that holds these words."""
    assert done.code == 2, done
    assert done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert all(word in done.err for word in words), done.err
