"""Machines and consoles that lack something: a home, UTF-8, a reader, memory, locks."""

import ast
import errno
import os
import subprocess
import sys

import jax
import pytest
from test_config import command

from arrag_jax import console, files
from arrag_jax.command import enable_compilation_cache
from arrag_jax.errors import UserError
from arrag_jax.failures import tells_of_memory
from helpers import children, running

# A command in little: what stands between a command and its surroundings, without the imports of a real one.
PROGRAM = """
import sys
from arrag_jax.command import Flag, main_with_config
def main(workdir):
    {body}
main_with_config(main, None, workdir=Flag("a folder", "w", path=True))
"""
WITHOUT_HOME = "import pwd\ndef nobody(_):\n    raise KeyError\npwd.getpwuid = nobody\n"


def run(body: str, shell: str = '"$0" -c "$1"', **environment: str) -> subprocess.CompletedProcess:
    """Runs a little command by way of a shell."""
    words = ["bash", "-c", f"set -o pipefail; {shell}", sys.executable, PROGRAM.format(body=body)]
    return subprocess.run(words, env=children.alone() | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_quietly():
    done = run("[print(i) for i in range(100_000)]", '"$0" -c "$1" | head -n 1')
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


@pytest.mark.slow
def test_a_pipe_that_is_closed_at_the_end_is_quiet_too():
    done = run("print(1); sys.exit(7)", '"$0" -c "$1" | sleep 0; exit ${PIPESTATUS[0]}')
    assert (done.returncode in (7, 141), done.stderr) == (True, "")
    done = run("import time; time.sleep(1); print(1)", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_line():
    done = run("print(1)", '"$0" -c "$1" > /dev/full')
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:19]) == (2, 1, "error: cannot write")


@pytest.mark.slow
def test_closed_streams_do_not_end_a_command():
    done = run("print(1); print(2, file=sys.stderr); return 3", '"$0" -c "$1" >&- 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_console_without_utf_8_gets_all_that_it_can_show(environment):
    done = run("print('\\u03bb \\xb1 \\xb7 \\udcff'); raise ValueError", **environment)
    assert done.stdout == "\\u03bb \\xb1 \\xb7 \\udcff\n" and done.returncode == 1
    done = run("from arrag_jax.errors import UserError; raise UserError('\\u03c4')", **environment)
    assert (done.returncode, done.stderr) == (2, "error: \\u03c4\n")


def test_a_broken_pipe_is_known_however_it_is_told():
    assert console.is_closed(BrokenPipeError())
    assert console.is_closed(RuntimeError("INTERNAL: CpuCallback error: BrokenPipeError: [Errno 32] Broken pipe"))
    assert not console.is_closed(OSError(errno.EIO, "no"))


@pytest.mark.slow
def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_HOME)
    environment = children.alone()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    environment = {k: v for k, v in environment.items() if k not in ("HOME", "JAX_COMPILATION_CACHE_DIR")}
    body = "import jax; print(jax.config.jax_compilation_cache_dir)"
    words = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    words = [*words, "--workdir=~/x"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), "--workdir=~/x" in done.stderr) == (2, 1, True)


@pytest.mark.parametrize("home", ["file/home", "x" * 300])
def test_a_home_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path, home):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 60595114880 bytes."),
    RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("failure", MEMORY, ids=[str(error)[:20] for error in MEMORY])
def test_lack_of_memory_names_what_needs_less_of_it(monkeypatch, tmp_path, capsys, failure):
    code, _ = command(monkeypatch, tmp_path, "--config=good.py", "--workdir=w", failure=failure)
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1) and said.startswith("error: out of memory")
    assert "lower config.batch_size (it is 4)" in said and "raise config.accumulate (it is 1)" in said


def test_jax_s_own_lack_of_memory_is_known():
    try:
        jax.numpy.zeros((2**46,), jax.numpy.int8).block_until_ready()
    except Exception as error:
        assert tells_of_memory(error)
    else:
        pytest.skip("this machine gives any amount of memory")


@pytest.mark.parametrize("failure", [ValueError("batch too large"), RuntimeError("No space left on device")])
def test_other_failures_are_not_taken_for_lack_of_memory(failure):
    assert not tells_of_memory(failure)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def without_locks(monkeypatch, request):
    """A file system that has no locks."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_told", set())


def test_a_file_system_without_locks_is_said_once_and_used(without_locks, tmp_path, capsys):
    for _ in range(2):
        with files.exclusive_lock(tmp_path):
            files.write_json(tmp_path / "a.json", 1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"the file system of {tmp_path} has no locks" in said


def test_several_processes_need_locks(without_locks, tmp_path):
    with pytest.raises(UserError, match="has no locks"), files.exclusive_lock(tmp_path, wait=True, alone=False):
        raise AssertionError


def test_other_failures_of_a_lock_are_not_passed_over(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="no"), files.exclusive_lock(tmp_path):
        raise AssertionError


@pytest.mark.slow
def test_texts_are_read_and_written_as_utf_8_whatever_the_locale():
    wrong = []
    for path in sorted((running.ROOT / "arrag_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = {keyword.arg for keyword in node.keywords}
            mode = [x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            text = name in ("read_text", "write_text") or (
                name == "open" and isinstance(node.func, ast.Name) and not any("b" in x for x in mode)
            )
            if text and "encoding" not in given:
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong
