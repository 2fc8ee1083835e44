"""What libraries report of their own work stays off the console of a command; --verbose lets it through."""

import io
import logging
import os
import sys

import pytest
from absl import logging as absl_logging
from test_surroundings import run

from arrag_jax import console, progress
from arrag_jax.data.emoji import dataset
from arrag_jax.native_output import hushed

CHATTER = "I0000 00:00:1795758635.399866   27703 partitioner.cc:58] Size of sampled dataset: 108702"
FIRST = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
ERROR = "E0000 00:00:1795758635.399866   27703 partitioner.cc:58] no memory"
ADVICE = "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed."
FAILURE = "CUDA backend failed to initialize: no driver."


@pytest.fixture(autouse=True)
def console_as_before(monkeypatch):
    level = absl_logging.get_verbosity()
    monkeypatch.setattr(console, "_quiet", console._quiet)
    yield
    absl_logging.set_verbosity(level)
    progress.show(True)


def write(text: str) -> None:
    """Writes a line as a C++ library does."""
    os.write(2, f"{text}\n".encode())


@pytest.mark.parametrize("quiet", [True, False])
def test_what_a_library_logs_in_cpp_is_dropped_but_for_errors(capfd, quiet):
    console.quiet(quiet)
    with hushed():
        for line in (FIRST, CHATTER, ERROR):
            write(line)
        print("own", file=sys.stderr)
    write(CHATTER)
    said = capfd.readouterr().err.splitlines()
    assert said == (["own", ERROR, CHATTER] if quiet else [FIRST, CHATTER, ERROR, "own", CHATTER])


def test_own_lines_reach_the_console_while_a_library_is_hushed(capfd):
    console.quiet(True)
    stderr = sys.stderr
    with pytest.raises(KeyError), hushed():
        print("now", file=sys.stderr)
        assert capfd.readouterr().err == "now\n"
        raise KeyError
    assert sys.stderr is stderr
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"


def test_a_stderr_that_is_no_file_is_left_alone(monkeypatch):
    console.quiet(True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with hushed():
        print("kept", file=sys.stderr)
    assert sys.stderr.getvalue() == "kept\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_advice_to_install_an_accelerator_is_dropped_and_its_failure_is_not(caplog, quiet):
    console.quiet(quiet)
    console.quiet(quiet)
    log = logging.getLogger("jax._src.xla_bridge")
    monkeyed = log.propagate
    log.propagate = True
    log.warning(ADVICE)
    log.warning(FAILURE)
    log.propagate = monkeyed
    assert [record.getMessage() for record in caplog.records if record.name == log.name] == (
        [FAILURE] if quiet else [ADVICE, FAILURE]
    )


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [True, False])
def test_a_data_set_is_made_with_one_bar(monkeypatch, tmp_path, capsys, quiet):
    """Of the package's own; TFDS's bars and prints come with --verbose alone."""
    console.quiet(quiet)
    monkeypatch.setattr(progress, "shown", lambda: True)
    dataset.load_source("emoji_scenes/tiny", "train", tmp_path)
    out, err = capsys.readouterr()
    assert ("Downloading and preparing" in out) == (not quiet)
    assert ("Generating" in err) == (not quiet)
    assert ("making emoji_scenes/tiny" in err) == quiet and ("320/320" in err) == quiet


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["", "--verbose"])
def test_every_command_takes_verbose(flag):
    body = "from absl import logging; logging.warning('from a library')"
    done = run(body, f'"$0" -c "$1" {flag}')
    assert (done.returncode, done.stdout) == (0, "")
    assert ("from a library" in done.stderr) == bool(flag)
