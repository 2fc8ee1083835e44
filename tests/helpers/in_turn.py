"""Runs commands one after another as a user types them, in one process of one device. As a script, that process."""

import contextlib
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers import children


class Done(NamedTuple):
    """A command that has ended."""

    command: str
    code: int
    out: str
    err: str


def run_in_turn(cwd: Path, *commands: str, needed: bool = True) -> list[Done]:
    """Runs ``python -m arrag_jax.… …`` lines in a folder; stops at the first that fails where all are needed."""
    return _in_a_process(cwd, commands, needed, "run")


def parse_in_turn(cwd: Path, *commands: str) -> list[Done]:
    """Reads such lines as far as their config and flags, the options of a task among them, and does nothing more."""
    return _in_a_process(cwd, commands, True, "parse")


def _in_a_process(cwd: Path, commands: tuple[str, ...], needed: bool, how: str) -> list[Done]:
    words = [sys.executable, "-m", "helpers.in_turn", str(int(needed)), how, *commands]
    done = subprocess.run(
        words, cwd=cwd, env=children.alone(), capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Done(*each) for each in json.loads(done.stdout)]
    failed = [each for each in found if each.code]
    assert not (needed and failed), failed[0]
    return found


def _parse_alone() -> None:
    """From now on commands end once their arguments are read."""
    from arrag_jax import command
    from arrag_jax.config import TrainConfig
    from arrag_jax.parsing import parse
    from arrag_jax.training.tasks import TASKS

    whole = command.main_with_config

    def main_with_config(main, *arguments, **flags) -> None:
        def read(*config, **_) -> None:
            if config and isinstance(config[0], TrainConfig):
                parse(TASKS[config[0].task][1], config[0].options, "config.options")

        read.__doc__ = main.__doc__
        whole(read, *arguments, **flags)

    command.main_with_config = main_with_config


def _run(command: str) -> Done:
    python, flag, module, *arguments = shlex.split(command, comments=True)
    assert (python, flag) == ("python", "-m"), command
    sys.argv, out, err, code = [module, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as ended:
            code = ended.code or 0
    return Done(command, code, out.getvalue(), err.getvalue())


if __name__ == "__main__":
    results, kept = [], os.dup(1)
    os.dup2(2, 1)  # what libraries print from C++
    _, needed, how, *lines = sys.argv
    if how == "parse":
        _parse_alone()
    for line in lines:
        results.append(_run(line))
        if results[-1].code and needed == "1":
            break
    os.write(kept, json.dumps(results).encode())
