"""Laws over the tree itself: who may import whom, how long things may be, what may not appear.

A new module of ``arrag_jax`` must be given a floor in ``FLOORS``; a file that has to be longer than the limits
says why in a line ``# size: reason`` among its first lines.
"""

import ast
import graphlib
import importlib
import importlib.metadata
import re
import runpy
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import ml_collections
import pytest

from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.parsing import parse
from arrag_jax.training.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "arrag_jax"
FILE_LINES, FUNCTION_LINES = 350, 60

# Module or package → floor. A file imports from the floors below its own, and from its own package.
FLOORS = {
    **dict.fromkeys(("signals", "forks", "progress", "errors", "config", "parsing", "files", "json_files"), 0),
    **dict.fromkeys(("command", "mesh", "ops", "hub", "meeting", "native_output", "processes", "checksums"), 0),
    **dict.fromkeys(("fields", "failures", "console", "usage", "huggingface", "costs", "allocator"), 0),
    **dict.fromkeys(("remote", "object_storage", "object_workdir"), 0),
    **dict.fromkeys(("interfaces", "nn", "figures", "topology"), 1),
    **dict.fromkeys(("models", "data", "work", "on_ray", "ray_actor", "ray_shares"), 2),
    **dict.fromkeys(("store",), 3),
    **dict.fromkeys(("retrieval", "decode"), 4),
    **dict.fromkeys(("training",), 5),
    **dict.fromkeys(("evaluation",), 6),
    **dict.fromkeys(("web",), 7),
    **dict.fromkeys(
        ("train", "generate", "build_datastore", "build_neighbors", "eval", "convert", "demo", "provenance"), 8
    ),
    **dict.fromkeys(("serve", "studio"), 8),
    "cli": 9,
}
# The imports allowed between two names of one floor (importer, imported).
PEERS = {
    ("errors", "signals"),
    ("forks", "errors"),
    ("native_output", "console"),
    ("native_output", "signals"),
    ("meeting", "errors"),
    ("meeting", "hub"),
    ("processes", "errors"),
    ("processes", "hub"),
    ("processes", "meeting"),
    ("processes", "native_output"),
    ("processes", "signals"),
    ("mesh", "processes"),
    ("command", "meeting"),
    ("command", "processes"),
    ("command", "progress"),
    ("config", "errors"),
    ("config", "fields"),
    ("config", "ops"),
    ("fields", "errors"),
    ("fields", "huggingface"),
    ("fields", "object_storage"),
    *(("object_storage", name) for name in ("errors", "failures", "files", "progress")),
    *(("object_workdir", name) for name in ("errors", "files", "meeting", "object_storage", "progress")),
    ("command", "object_workdir"),
    *(("remote", name) for name in ("errors", "huggingface", "object_storage")),
    ("command", "remote"),
    ("huggingface", "console"),
    ("huggingface", "errors"),
    ("huggingface", "progress"),
    ("files", "failures"),
    ("usage", "fields"),
    ("command", "console"),
    ("command", "failures"),
    ("command", "fields"),
    ("command", "usage"),
    ("parsing", "errors"),
    ("files", "errors"),
    ("json_files", "errors"),
    ("command", "errors"),
    ("command", "files"),
    ("command", "parsing"),
    ("command", "mesh"),
    ("mesh", "errors"),
    ("mesh", "config"),
    ("ops", "errors"),
    ("nn", "interfaces"),
    ("studio", "demo"),
    ("work", "on_ray"),
    ("on_ray", "ray_actor"),
    ("ray_shares", "on_ray"),
    ("ray_shares", "ray_actor"),
    ("ray_shares", "work"),
}
FORBIDDEN_IMPORTS = {"tensorflow", "torch", "pickle", "cloudpickle", "dill", "pillow_heif", "transformers", "ftfy"}
FORBIDDEN_IMPORTS |= {"onnxruntime"}
FORBIDDEN_IMPORTS |= {"fastapi", "gradio", "starlette", "uvicorn"}
FORBIDDEN_IMPORTS |= {"ray"}  # only ``on_ray`` loads it, by name, because mypy would read all of it
# PyTorch's own files can be read by PyTorch alone; it is imported where one is met, and its absence is a UserError.
# HEIC is read by pillow-heif alone; without it such files are passed over, with the reason.
# A text encoder of other people's runs in their library; captions whose letters are mis-decoded are mended by another.
# Detectors and VQA models of benchmarks run in the libraries that published them.
OPTIONAL_IMPORTS = {
    ("models.tensor_files", "torch"),
    ("data.pixels", "pillow_heif"),
    ("models.t5", "torch"),
    ("models.t5", "transformers"),
    ("models.t5_text", "ftfy"),
    ("evaluation.geneval.yolox", "onnxruntime"),
    ("evaluation.pretrained", "torch"),
    ("evaluation.pretrained", "transformers"),
}
# Modules that consist of a web framework's routes or pages; commands import them in functions.
WEB_IMPORTS = {("web.endpoint", "fastapi"), ("web.endpoint", "starlette"), ("serve", "uvicorn")}
# Written in two halves, so that this file does not hold what it looks for.
FORBIDDEN_TEXT = re.compile(r"(?<![\w.])/(ho" r"me/|ro" r"ot/|wo" r"rk\b)|\b(TO" r"DO|FIX" r"ME)\b")


def listed_files() -> list[Path]:
    """Files that git tracks or would track, as they are on disk."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [path for name in sorted(set(names.split("\0"))) if name and (path := ROOT / name).is_file()]


def modules() -> dict[str, ast.Module]:
    """Dotted name below ``arrag_jax`` → syntax tree; a package goes by its own name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        trees[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(), str(path))
    return trees


def imported_names(tree: ast.Module) -> set[str]:
    """Every dotted name that a file imports, wherever in it; ``from a import b`` gives ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}; write arrag_jax.…"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of this package (names below ``arrag_jax``) that a file imports."""
    found = set()
    for name in imported_names(tree):
        head, _, below = name.partition(".")
        if head == "arrag_jax":
            while below not in known:  # the last part may be a function rather than a module
                below = below.rpartition(".")[0]
            found.add(below)
    return found - {""}


def test_every_module_has_a_floor():
    assert {name.split(".")[0] for name in modules()} - {""} <= FLOORS.keys()


def test_imports_point_down():
    trees, wrong = modules(), []
    for name, tree in trees.items():
        for other in own_imports(tree, set(trees)):
            importer, imported = name.split(".")[0], other.split(".")[0]
            if importer == imported or (importer, imported) in PEERS:
                continue
            if FLOORS[imported] >= FLOORS[importer]:
                wrong.append(f"{name} (floor {FLOORS[importer]}) imports {other} (floor {FLOORS[imported]})")
    assert not wrong


def test_peers_are_of_one_floor():
    assert all(FLOORS[importer] == FLOORS[imported] for importer, imported in PEERS)


def test_imports_have_no_cycle():
    trees = modules()
    graph = {name: own_imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(trees)


def test_one_table_alone_imports_the_emoji_scenes():
    """A data set is one source among others: beside its own folder and its benchmark's, ``data.registry`` names it."""
    trees = modules()
    importers = {
        name
        for name, tree in trees.items()
        if any(other == "data.emoji" or other.startswith("data.emoji.") for other in own_imports(tree, set(trees)))
    }
    outside = {name for name in importers if not name.startswith(("data.emoji", "evaluation.emoji"))}
    assert outside == {"data.registry"}


def test_no_foreign_framework_and_no_pickle():
    pairs = {(name, word.split(".")[0]) for name, tree in modules().items() for word in imported_names(tree)}
    assert {pair for pair in pairs if pair[1] in FORBIDDEN_IMPORTS} == OPTIONAL_IMPORTS | WEB_IMPORTS


def test_optional_imports_stand_in_functions():
    trees = modules()
    for name, foreign in OPTIONAL_IMPORTS:
        outside = [node for node in trees[name].body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert foreign not in imported_names(ast.Module(outside, []))


def test_no_module_imports_a_web_framework_when_it_is_imported_itself():
    """But for those that are one: they are imported in functions alone, so that everything else runs without."""
    framed = {"arrag_jax.web.endpoint", "arrag_jax.web.page"}  # the page loads Gradio by name
    for name, tree in modules().items():
        outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = imported_names(ast.Module(outside, []))
        assert f"arrag_jax.{name}" in framed or not {each for each in names if each.startswith(tuple(framed))}, name


def pins(file: str) -> list[str]:
    """The requirement lines of a file; comments, blanks and includes left out."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def plain(distribution: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned(file):
    assert [line for line in pins(file) if not re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+]+( *;.*)?", line)] == []


def test_every_import_is_a_core_requirement():
    """What ``arrag_jax`` imports comes with requirements.txt alone."""
    names = {name.split(".")[0] for tree in modules().values() for name in imported_names(tree)}
    foreign = names - set(sys.stdlib_module_names) - {"arrag_jax"}
    foreign -= {word for _, word in OPTIONAL_IMPORTS | WEB_IMPORTS}
    core = {plain(re.split(r"[\[=; ]", line)[0]) for line in pins("requirements.txt")}
    owners = importlib.metadata.packages_distributions()
    assert {name for name in foreign if not core & {plain(owner) for owner in owners.get(name, [])}} == set()


def test_files_and_functions_are_short():
    long = []
    for path in (path for path in listed_files() if path.suffix == ".py"):
        lines = path.read_text().splitlines()
        if any(re.match(r"# size: \S", line) for line in lines[:10]):
            continue
        where = path.relative_to(ROOT)
        if len(lines) > FILE_LINES:
            long.append(f"{where}: {len(lines)} lines")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    long.append(f"{where}: {node.name} has {length} lines")
    assert not long


def test_no_model_is_named_outside_models():
    """Everything else goes through the seams of ``interfaces`` and ``models.registry``."""
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        lines = [] if where.parts[0] == "models" else path.read_text().splitlines()
        code = [(n, line.partition("#")[0]) for n, line in enumerate(lines, 1)]
        named += [f"{where}:{n}" for n, line in code if re.search(r"\bJanus\b|\bgen_vision_model\b", line)]
    assert not named


def test_every_public_thing_has_a_docstring():
    bare = []
    for name, tree in modules().items():
        if not tree.body:  # an empty __init__.py
            continue
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        public = [node for node in public if not node.name.startswith("_")]
        bare += [f"{name}.{getattr(node, 'name', '')}" for node in [tree, *public] if not ast.get_docstring(node)]
    assert not bare


def test_few_complaints_of_the_type_checker_are_ignored():
    """Each names its code and says why; no module is left out."""
    lines = [line for path in PACKAGE.rglob("*.py") for line in path.read_text().splitlines() if "type: ignore" in line]
    assert [line for line in lines if not re.search(r"  # type: ignore\[[\w-]+\]  # \S", line)] == []
    assert len(lines) <= 10
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert all(each.keys() == {"module", "ignore_missing_imports"} for each in settings["overrides"])


def test_no_machine_path_and_no_note_to_self():
    wrong = []
    for path in listed_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture or another binary
        wrong += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if FORBIDDEN_TEXT.search(line)]
    assert not wrong


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_one_of_the_commands_that_its_docstring_gives(path):
    """Every key is known to them, those of a task's options included."""
    module = runpy.run_path(str(path))
    config = module["get_config"]()
    assert isinstance(config, ml_collections.ConfigDict)
    if config.get("source") == "":  # which the command line must give
        config.source = "photos"
    if config.get("data", {}).get("source") == "":
        config.data.source = "photos"
    assert module["__doc__"]
    commands = re.findall(rf"-m arrag_jax\.(\w+) --config configs/{path.name}", module["__doc__"])
    assert commands
    for command in commands:
        kind = typing.get_type_hints(importlib.import_module(f"arrag_jax.{command}").run)["config"]
        kind = next(iter(typing.get_args(kind)), kind)  # of "Config | None"
        parsed = parse(kind, config)
        if kind is TrainConfig:
            parse(TASKS[parsed.task][1], parsed.options, "config.options")


def test_a_typo_in_a_tasks_options_is_found():
    config = runpy.run_path(str(ROOT / "configs" / "janus_pro_1b_faid.py"))["get_config"]()
    config.options.lora.rnak = 128
    with pytest.raises(UserError, match=r"unknown key config\.options\.lora\.rnak"):
        parse(TASKS["faid"][1], parse(TrainConfig, config).options, "config.options")


def test_the_map_of_the_tree_names_every_module_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    assert set(re.findall(r"^  (\S+\.py) ", page, re.MULTILINE)) == {str(file) for file in files}
