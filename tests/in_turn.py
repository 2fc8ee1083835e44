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

import children


class Done(NamedTuple):
    """A command that has ended."""

    command: str
    code: int
    out: str
    err: str


def run_in_turn(cwd: Path, *commands: str, needed: bool = True) -> list[Done]:
    """Runs ``python -m arrag_jax.… …`` lines in a folder; stops at the first that fails where all are needed."""
    words = [sys.executable, __file__, str(int(needed)), *commands]
    done = subprocess.run(
        words, cwd=cwd, env=children.alone(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Done(*each) for each in json.loads(done.stdout)]
    failed = [each for each in found if each.code]
    assert not (needed and failed), failed[0]
    return found


def _run(command: str) -> Done:
    python, flag, module, *arguments = shlex.split(command)
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
    for line in sys.argv[2:]:
        results.append(_run(line))
        if results[-1].code and sys.argv[1] == "1":
            break
    os.write(kept, json.dumps(results).encode())
