"""``arrag COMMAND`` is ``python -m arrag_jax.MODULE``, also in what it says; configs are found from any directory."""

import importlib
import shlex
import subprocess
import sys

import pytest

import arrag_jax
from arrag_jax import cli, console, demo, errors
from arrag_jax.errors import UserError
from arrag_jax.parsing import CONFIGS, config_file
from helpers import children, running
from helpers.in_turn import parse_in_turn


@pytest.fixture
def arrag(monkeypatch, capsys):
    """Runs ``arrag ARGUMENTS`` in this process."""
    monkeypatch.setattr(errors, "start_command", lambda: None)
    monkeypatch.setattr(errors, "_names", {})
    monkeypatch.setattr(sys, "orig_argv", sys.orig_argv)

    def run(*arguments: str) -> running.Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["arrag", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return running.Done(code, *capsys.readouterr())

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_its_module(arrag, capsys, monkeypatch, name):
    module = cli.COMMANDS[name].module
    own = running.run(capsys, monkeypatch, module, "--help")
    done = arrag(name, "--help")
    assert (done.code, done.err) == (own.code, own.err) == (0, "")
    assert f"python -m arrag_jax.{module}" in own.out and "python -m arrag_jax." not in done.out
    assert done.out == own.out.replace(f"python -m arrag_jax.{module}", f"arrag {name}")
    assert sys.orig_argv[1:] == ["-m", f"arrag_jax.{module}", "--help"]


def test_every_module_that_is_a_command_has_a_name():
    modules = {
        path.stem for path in (running.ROOT / "arrag_jax").glob("*.py") if "\n    main_with_config(" in path.read_text()
    }
    assert {command.module for command in cli.COMMANDS.values()} == modules


@pytest.mark.parametrize("flag", [(), ("-h",), ("--help",)])
def test_help_lists_the_commands(arrag, flag):
    done = arrag(*flag)
    assert (done.code, done.err) == (0, "")
    assert all(f"\n  {name} " in done.out for name in cli.COMMANDS)


def test_the_version_is_the_package_s(arrag):
    assert arrag("--version") == (0, f"arrag {arrag_jax.__version__}\n", "")


def test_an_unknown_command_lists_the_known(arrag):
    running.assert_one_line(arrag("build_store"), "'build_store'", *cli.COMMANDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_mends_name_the_command_as_it_was_called(arrag, capsys, monkeypatch, tmp_path):
    words = ("--config=emoji_daid", "--prompt=a cat", f"--config.retrieval.store={tmp_path}", f"--workdir={tmp_path}")
    assert "build it with: arrag store --config=" in arrag("generate", *words).err
    monkeypatch.setattr(errors, "_names", {})
    done = running.run(capsys, monkeypatch, "generate", *words)
    assert "build it with: python -m arrag_jax.build_datastore --config=" in done.err


def test_the_console_command_starts_a_process_of_its_own(tmp_path):
    """From another directory; its first act is to take the signals."""
    program = "from arrag_jax import cli, signals; cli.main(); print(signals._command)"
    words = [sys.executable, "-c", program, "--version"]
    done = subprocess.run(words, cwd=tmp_path, env=children.alone(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"arrag {arrag_jax.__version__}\nTrue\n", "")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs_are_found_from_any_directory(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    assert config_file(path.stem) == config_file(f"configs/{path.name}") == str(path)
    (tmp_path / path.stem).mkdir()  # a run's folder may have the same name
    assert config_file(path.stem) == str(path)
    own = tmp_path / "configs" / path.name
    own.parent.mkdir()
    own.write_text("")
    assert config_file(f"configs/{path.name}") == f"configs/{path.name}"


@pytest.mark.parametrize(
    "name", ["emoji_dait", "other/emoji_daid.py", "emoji_daid.py", "configs/emoji_daid", "a\0b", ""]
)
def test_other_names_are_no_shipped_configs(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist.*emoji_caption, .*emoji_daid"):
        config_file(name)


@pytest.mark.slow
def test_the_demo_is_commands_that_parse(tmp_path):
    lines = [shlex.join(["python", "-m", f"arrag_jax.{module}", *words]) for module, *words in demo.COMMANDS]
    parse_in_turn(tmp_path, *lines)


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("code", [0, 2])
def test_the_demo_runs_them_in_order_until_one_fails(monkeypatch, code, quiet):
    ran = []

    def run_module(module: str, run_name: str) -> None:
        ran.append([module, *sys.argv[1:]])
        sys.exit(code)

    monkeypatch.setattr(demo.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(console, "_quiet", quiet)
    if code:
        with pytest.raises(SystemExit) as end:
            demo.run("some where")
        assert end.value.code == code
    else:
        demo.run("some where")
    modules = ["arrag_jax.build_datastore", "arrag_jax.build_datastore", "arrag_jax.generate"]
    assert [words[0] for words in ran] == modules[: 1 if code else 3]
    assert all("--workdir=some where/" in " ".join(words) and ("--verbose" in words) != quiet for words in ran)


def test_every_command_can_be_imported():
    for command in cli.COMMANDS.values():
        assert callable(importlib.import_module(f"arrag_jax.{command.module}").run)
