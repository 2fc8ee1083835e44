"""What a wheel holds, and that its declared dependencies are those of the lock files."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from test_house import PACKAGE, listed_files, pins, plain

import arrag_jax
from arrag_jax import cli
from arrag_jax.data.pixels import HEIF_PACKAGE
from arrag_jax.parsing import CONFIGS
from helpers import children
from helpers.running import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by plain name."""
    found = [Requirement(line) for line in lines]
    return {plain(each.name): each for each in found}


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """What pyproject.toml asks for; an extra's own extras included."""
    found = requirements(EXTRAS[extra] if extra else PROJECT["project"]["dependencies"])
    own = found.pop("arrag-jax", None)
    for other in own.extras if own else ():
        found |= declared(other)
    return found


@pytest.mark.parametrize(("file", "extra"), [("requirements.txt", None), ("requirements-dev.txt", "dev")])
def test_the_ranges_admit_the_lock(file, extra):
    """Both name the same packages, on the same systems."""
    ranges, lock = declared(extra), requirements(pins(file))
    assert ranges.keys() == lock.keys()
    for name, pinned in lock.items():
        (version,) = (each.version for each in pinned.specifier)
        assert ranges[name].specifier, f"{name} has no range"
        assert ranges[name].specifier.contains(version), f"{name}: {ranges[name].specifier} leaves {version} out"
        assert ranges[name].marker == pinned.marker, name


def test_no_range_is_a_pin():
    for name, each in (declared() | declared("dev")).items():
        assert not any(part.operator in ("==", "===") for part in each.specifier), name


def test_an_accelerator_s_extra_is_jax_s_own():
    """In the range of the core."""
    for extra, theirs in (("cuda", "cuda12"), ("tpu", "tpu")):
        ((name, each),) = declared(extra).items()
        assert (name, each.extras, str(each.specifier)) == ("jax", {theirs}, "")


def test_the_package_that_reads_heic_is_the_extra():
    assert declared("heic").keys() == {plain(HEIF_PACKAGE)}


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", arrag_jax.__version__)
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "arrag_jax.__version__"
    for path in listed_files():
        if path.name in ("pyproject.toml", "setup.py") or path.parent == PACKAGE:
            text = path.read_text(encoding="utf-8")
            assert len(re.findall(r'"0\.\d+\.\d+"', text)) == (path == PACKAGE / "__init__.py"), path


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> set[str]:
    """The files of the wheel's packages, relative to it, as setuptools lays them out."""
    out = tmp_path_factory.mktemp("wheel")
    words = ["setup.py", "--quiet", "egg_info", f"--egg-base={out}", "build_py", f"--build-lib={out / 'lib'}"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=children.alone(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(out / "lib")) for path in (out / "lib").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_wheel_holds_the_package_its_assets_and_its_configs(contents):
    tracked = {path for path in listed_files() if path.is_relative_to(PACKAGE) or path.parent == CONFIGS}
    assert contents == {
        str(path.relative_to(ROOT) if path.is_relative_to(PACKAGE) else f"arrag_jax/configs/{path.name}")
        for path in tracked
    }
    assert contents >= {"arrag_jax/py.typed", "arrag_jax/assets/emoji_janus/model.safetensors"}
    assert "arrag_jax/configs/emoji_daid.py" in contents
    assert not [name for name in contents if "test" in name]


def test_the_console_script_is_the_command_line():
    assert PROJECT["project"]["scripts"] == {"arrag": "arrag_jax.cli:main"}
    assert callable(cli.main)


def test_licence_and_credits_are_there():
    licence, notice = ((ROOT / name).read_text(encoding="utf-8") for name in PROJECT["project"]["license-files"])
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "Twemoji" in notice and "CC-BY 4.0" in notice and "Twitter, Inc. and other" in notice
