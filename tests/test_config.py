"""Configs are read strictly, and a command tells what is wrong with its arguments in one line."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig, MeshConfig, OptimizerConfig, TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.parsing import parse
from arrag_jax.training.prior import PriorOptions
from helpers import children

GOOD = {"task": "prior", "steps": 3, "batch_size": 4, "options": {}}


@dataclasses.dataclass(frozen=True)
class Kinds:
    """One field of every kind that a config may hold."""

    share: float = 0.5
    sizes: tuple = ()
    name: str | None = None
    on: bool = False
    mesh: MeshConfig = MeshConfig()


def test_defaults_are_the_dataclass_and_given_keys_win():
    config = parse(TrainConfig, ConfigDict(GOOD | {"optimizer": {"learning_rate": 0.5}}))
    assert config == TrainConfig(**GOOD | {"options": config.options, "optimizer": OptimizerConfig(learning_rate=0.5)})


def test_the_only_conversions_are_int_to_float_and_list_to_tuple():
    config = parse(Kinds, {"share": 1, "sizes": [1, 2], "name": None, "on": True})
    assert config == Kinds(1.0, (1, 2), None, True)
    assert isinstance(config.share, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, r"unknown key config\.batchsize \(did you mean 'batch_size'\?\)"),
        ({"optimizer": {"lr": 1.0}}, r"unknown key config\.optimizer\.lr"),
        ({"steps": "3"}, r"config\.steps must be int, got '3'"),
        ({"steps": True}, r"config\.steps must be int, got True"),
        ({"steps": 0}, r"steps=0 is outside"),
        ({"task": "priors"}, r"task='priors' is unknown; choose one of tokenizer, prior, faid"),
        ({"compute_dtype": "float16"}, r"compute_dtype='float16' is unknown; choose one of float32, bfloat16"),
        ({"accumulate": 0}, r"accumulate=0 is outside"),
        ({"optimizer": 3}, r"config\.optimizer must hold keys, not 3"),
        ({"optimizer": {"warmup_steps": -1}}, r"optimizer\.warmup_steps=-1 is outside \[0, inf\]"),
        ({"optimizer": {"b2": 1.0}}, r"optimizer\.b2=1\.0 is outside \[0, 1\)"),
        ({"optimizer": {"clip_norm": 0}}, r"optimizer\.clip_norm=0\.0 must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 is outside \[0, 1\)"),
        ({"data": {"eval_examples": 0}}, r"eval_examples=0 is outside"),
        ({"seed": -1}, r"config: seed=-1 is outside \[0, 2\^32\)"),
        ({"seed": 2**32}, r"seed=4294967296 is outside"),
    ],
)
def test_a_bad_key_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, GOOD | changes)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (DrawConfig, {"model": "m", "retrieval": {"store": "s"}, "seed": -1}, "seed=-1 is outside"),
        (
            DrawConfig,
            {"model": "m", "retrieval": {"store": "s"}, "caption": {"daid": {"weight": 2.0}}},
            r"config\.caption\.daid: DAiD's weight λ = 2\.0 is outside",
        ),
        (PriorOptions, {"preset": "janus-emoji", "tokenizer": "t", "caption_dropout": 1.5}, "caption_dropout=1.5"),
    ],
)
def test_a_value_out_of_range_is_named(kind, config, message):
    with pytest.raises(UserError, match=message):
        parse(kind, config)


def test_every_error_is_told_at_once():
    with pytest.raises(UserError) as error:
        parse(TrainConfig, {"task": "prior", "stps": 3, "batch_size": "4", "optimizer": {"b3": 1.0}})
    for part in ("config.stps", "config.batch_size must be int", "config.optimizer.b3", "missing key config.options"):
        assert part in str(error.value)


def command(
    monkeypatch, tmp_path, *arguments: str, config_class: type = TrainConfig, failure: Exception | None = None
) -> tuple[int, list]:
    """Exit code of a command run with these arguments, and what its main function was called with."""
    (tmp_path / "good.py").write_text(f"def get_config(base='tiny'):\n    return {GOOD} | dict(init_from=base)\n")
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    draw = {"model": "m", "retrieval": {"store": "s", "keys": "codebook"}, "sampling": {"cfg_scale": 1.5}}
    (tmp_path / "draw.py").write_text(f"def get_config():\n    return {draw}\n")
    called = []

    def main(config, workdir: str, count: int) -> int:
        called.append((config, workdir, count))
        if failure is not None:
            raise failure
        return 7

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")  # so that the command leaves jax's own setting alone
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main_with_config(main, config_class, workdir=Flag("a folder", path=True), count=Flag("a number", 2))
    return exit_.value.code, called


def test_a_command_gets_its_config_and_flags(monkeypatch, tmp_path):
    arguments = ["--config", "good.py:large", "--workdir=w", "--config.steps=9", "--config.optimizer.b1=0.5"]
    code, [(config, workdir, count)] = command(monkeypatch, tmp_path, *arguments, "--config.seed=5")
    assert (code, workdir, count) == (7, "w", 2)
    assert (config.init_from, config.steps, config.optimizer.b1, config.seed) == ("large", 9, 0.5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=good.py"], "missing --workdir"),
        (["--workdir=w"], "missing --config"),
        (["--config=none.py", "--workdir=w"], "config file none.py does not exist"),
        (["--config=broken.py", "--workdir=w"], "config file broken.py failed: ZeroDivisionError"),
        (["--config=good.py", "--workdir=w", "--wrkdir=x"], "unknown argument '--wrkdir=x'"),
        (["--config=good.py", "--workdir=w", "more"], "unknown argument 'more'"),
        (["--config=good.py", "--workdir=gs://b/w"], "--workdir=gs://b/w is an address"),
        (["--config=good.py", "--workdir=w", "--count=x"], "--count=x"),
        (["--config=good.py", "--workdir=w", "--config.stepz=3"], "unknown key config.stepz (did you mean 'steps'?)"),
        (["--config=good.py", "--workdir=w", "--config.steps=x"], "--config.steps=x"),
        (["--config=good.py", "--workdir=w", "--config.optimzer.b1=0.5"], "unknown section in '--config.optimzer.b1'"),
        (["--config=good.py", "--workdir=w", "--config.seed.real=1"], "unknown section in '--config.seed.real'"),
        (["--config=good.py", "--workdir=w", "--config.=1"], "'--config.' names no key"),
        (["--config=good.py", "--workdir=w", "--config.0=1"], "'--config.0' names no key"),
        (["--config=good.py", "--workdir=w", "--config.se ed=1"], "'--config.se ed' names no key"),
        (["--config=good.py", "--workdir=w", "--config.seed[0]=1"], "'--config.seed[0]' names no key"),
        (["--config=good.py", "--workdir=w", "--config.optimizer=3"], "--config.optimizer=3"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_two(monkeypatch, tmp_path, capsys, arguments, message):
    code, called = command(monkeypatch, tmp_path, *arguments)
    assert (code, called) == (2, [])
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_help_names_every_flag(monkeypatch, tmp_path, capsys):
    code, called = command(monkeypatch, tmp_path, "--help")
    assert (code, called) == (0, [])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--config", "--workdir", "--count"))


def test_what_may_be_none_can_be_switched_off_and_keeps_its_type(monkeypatch, tmp_path, capsys):
    def drawn_with(*overrides: str):
        arguments = ["--config=draw.py", "--workdir=w", *overrides]
        code, called = command(monkeypatch, tmp_path, *arguments, config_class=DrawConfig)
        return called[0][0] if code == 7 else capsys.readouterr().err

    assert drawn_with().sampling.cfg_scale == 1.5
    assert drawn_with("--config.sampling.cfg_scale=None").sampling.cfg_scale is None
    assert drawn_with("--config.sampling.cfg_scale=3", "--config.sampling.top_k=None").sampling.cfg_scale == 3.0
    assert "config.sampling.cfg_scale must be float | None, got 'x'" in drawn_with("--config.sampling.cfg_scale=x")
    assert "config.seed" in drawn_with("--config.seed=None")
    # ConfigDict has a method of this name.
    assert drawn_with("--config.retrieval.keys=latent").retrieval.keys == "latent"
    # A section within a section may be left out of the file, too.
    assert drawn_with("--config.caption.daid.weight=0.25").caption.daid.weight == 0.25


@pytest.mark.parametrize(
    ("failure", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "metrics.jsonl"),
        (OSError(errno.ENOSPC, "No space left on device"), "w"),
        (ValueError('RESOURCE_EXHAUSTED: Error writing "step/0": No space left on device [os_error_code=28]'), "w"),
    ],
)
def test_a_full_disk_is_one_line_wherever_it_is_met(monkeypatch, tmp_path, capsys, failure, named):
    code, called = command(monkeypatch, tmp_path, "--config=good.py", "--workdir=w", failure=failure)
    assert (code, len(called)) == (2, 1)
    said = "the disk is full: free some space and run the same command again to continue"
    assert capsys.readouterr().err == f"error: cannot write {named}: {said}\n"


@pytest.mark.parametrize(
    "failure",
    [
        FileExistsError(errno.EEXIST, "no", "a/w"),  # a file
        NotADirectoryError(errno.ENOTDIR, "no", "a/w/pictures"),
        PermissionError(errno.EACCES, "no", "a"),  # on the way to it
        OSError(errno.EROFS, "no", "a/w/grid.png"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, capsys, failure):
    code, called = command(monkeypatch, tmp_path, "--config=good.py", "--workdir=a/w", failure=failure)
    assert (code, len(called)) == (2, 1)
    assert capsys.readouterr().err == f"error: cannot write {failure.filename}: no; choose another --workdir\n"


@pytest.mark.parametrize("failure", [ValueError("no"), ConnectionRefusedError(errno.ECONNREFUSED, "no")])
def test_other_failures_are_not_taken_for_those_of_a_disk(monkeypatch, tmp_path, failure):
    with pytest.raises(type(failure)):
        command(monkeypatch, tmp_path, "--config=good.py", "--workdir=w", failure=failure)


def test_an_interrupt_while_a_command_is_imported_is_one_line(tmp_path):
    # A process begun in a shell's background ignores the signal, and so do its children unless they say otherwise.
    lines = "import signal", "signal.signal(signal.SIGINT, signal.default_int_handler)", "signal.raise_signal(2)"
    (tmp_path / "jax.py").write_text("\n".join(lines))
    environment = children.alone()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    words = [sys.executable, "-m", "arrag_jax.generate"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")
