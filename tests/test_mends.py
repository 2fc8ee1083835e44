"""Where an error names a command or a flag, that command runs, or the flag ends the error."""

import dataclasses
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_chains import commands_in

from arrag_jax import build_datastore, build_neighbors
from arrag_jax.config import (
    CaptionConfig,
    DatastoreConfig,
    DrawConfig,
    MeshConfig,
    NeighborsConfig,
    RetrievalConfig,
    ScannOptions,
)
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store import segments
from arrag_jax.store.datastore import Datastore
from helpers import tiny, workshop

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ONE = MeshConfig(1, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A tiny model, its data set, a plain store of it without index and captions, and neighbour sets."""
    folder = tmp_path_factory.mktemp("mends")
    workshop.build(folder)
    return folder


@pytest.fixture
def folder(built, tmp_path, monkeypatch) -> Path:
    """A copy; of the store's settings the model and the data are those that ``built`` has."""
    shutil.copytree(built / "store", tmp_path / "store")
    for name in ("model", "data", "neighbors"):
        (tmp_path / name).symlink_to(built / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, command: str) -> int:
    """Exit code of ``python -m arrag_jax.… …``."""
    _, _, module, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    return ended.value.code or 0


def search(**changes) -> object:
    model = load_model("model").fingerprint
    return load_retriever(RetrievalConfig("store", k=3, **changes), model)[1]


SEARCHES = {
    "no index": {},
    "no keys": {"keys": "latent"},
    "no keys, dense": {"keys": "latent", "search": "dense"},
    "other leaves": {"scann": ScannOptions(exhaustive_below=0, leaves=9)},
    "other leaves and bytes": {"keys": "latent", "scann": ScannOptions(0, 7, 3, 4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SEARCHES)
def test_a_search_that_lacks_something_names_the_command_that_adds_it(folder, monkeypatch, case):
    """Also where an index of other options is there, or one of a smaller store."""
    if case.startswith("other"):
        config = DatastoreConfig("model", workshop.SOURCE, data_dir="data", num_images=24)
        build_datastore.run(dataclasses.replace(config, data_dir=str(folder / "data")), "store")
    for _ in range(2):  # one command may be for the keys, the next for the index
        try:
            search(**SEARCHES[case])
            break
        except UserError as error:
            (command,) = commands_in(str(error))
            assert run(monkeypatch, command) == 0, command
    search(**SEARCHES[case])


def test_an_index_of_other_shards_names_its_command(folder, monkeypatch):
    from arrag_jax.retrieval import index

    store = Datastore.open("store")
    index.build_index(store, "codebook", ScannOptions())
    with pytest.raises(UserError) as error:
        index.load_index(store, "codebook", 3, ScannOptions(), shards=2)
    (command,) = commands_in(str(error.value))
    assert run(monkeypatch, command) == 0
    index.load_index(store, "codebook", 3, ScannOptions(), shards=2)
    with pytest.raises(UserError) as error:
        index.load_index(store, "codebook", 3, ScannOptions(), shards=1)
    assert run(monkeypatch, commands_in(str(error.value))[0]) == 0
    index.load_index(store, "codebook", 3, ScannOptions(), shards=1)


def test_a_store_that_is_not_there_names_its_command(folder, monkeypatch):
    with pytest.raises(UserError) as error:
        Datastore.open("other store")
    (command,) = commands_in(str(error.value))
    flags = f" --config.model=model --config.source={workshop.SOURCE} --config.data_dir=data --config.num_images=9"
    command = command.replace("--config=CONFIG", f"--config={CONFIGS}/emoji_datastore.py").replace(
        "other store", "other"
    )
    assert run(monkeypatch, command + flags) == 0
    assert Datastore.open("other").num_images == 9


@pytest.mark.slow
def test_captions_are_added_by_the_command_that_their_absence_names(folder, monkeypatch):
    config = DrawConfig("model", RetrievalConfig("store", k=3, search="dense"), mesh=ONE, caption=CaptionConfig(8, 3))
    with pytest.raises(UserError) as error:
        open_pipeline(config, ["static"])
    assert run(monkeypatch, commands_in(str(error.value))[0]) == 0
    assert len(open_pipeline(config, ["static"]).store.captions) == 24


@pytest.mark.slow
def test_stores_of_other_kinds_are_made_alike_by_what_the_merge_and_the_append_say(folder, monkeypatch):
    config = DatastoreConfig("model", workshop.SOURCE, "valid", "data", num_images=5, captions=True, indexes=())
    config = dataclasses.replace(config, keys=("latent",))
    build_datastore.run(config, "valid")
    stores = lambda: [Datastore.open(name) for name in ("store", "valid")]  # noqa: E731
    for _ in range(2):  # the keys, then the captions
        with pytest.raises(UserError) as error:
            segments.merge(stores(), "both")
        commands = re.split(" and (?=python)", str(error.value).partition("first run: ")[2])
        assert commands
        for command in commands:
            assert run(monkeypatch, command) == 0
    assert segments.merge(stores(), "both").num_images == 29
    more = dataclasses.replace(config, split="test", keys=("codebook", "latent"))
    shutil.copytree(folder.joinpath("store").resolve(), "again")
    build_datastore.run(more, "again", append=True)
    assert Datastore.open("again").num_images == 29


@pytest.mark.slow
def test_a_run_without_export_names_the_conversion(folder, monkeypatch):
    from arrag_jax.training.loop import train
    from arrag_jax.training.tasks import make_task

    config = workshop.config(folder, steps=1, eval_every=1, checkpoint_every=1, mesh=ONE)
    train(config, make_task(config), Path("run"))
    shutil.rmtree("run/export")
    with pytest.raises(UserError) as error:
        load_model("run")
    (command,) = commands_in(str(error.value))
    assert run(monkeypatch, command.replace("DIR", "run/export")) == 0
    load_model("run")
    for flags in ("--to=janus", "--nomerge_lora"):  # of a run: said, and the export goes there
        assert run(monkeypatch, f"python -m arrag_jax.convert --source run --target x {flags}") == 2
    assert run(monkeypatch, "python -m arrag_jax.convert --source run/export --target x --to=janus") == 0


FLAGS = {
    "faid": (["faid"], {}, MeshConfig(1, 1)),
    "lora": (["lora"], {}, MeshConfig(1, 1)),
    "one device": (["static"], {}, MeshConfig(2, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_that_drawing_names_ends_the_error(folder, case):
    """``give config.faid_model`` and the like: given, that error is no more."""
    methods, changes, mesh = FLAGS[case]
    config = DrawConfig("model", RetrievalConfig("store", k=3, search="dense"), mesh=mesh, **changes)
    with pytest.raises(UserError) as error:
        open_pipeline(config, methods)
    named = re.findall(r"config\.(\w+)(?:\.(\w+)=(\d))?", str(error.value))
    assert named
    for section, key, value in named:
        change = dataclasses.replace(config.mesh, **{key: int(value)}) if key else "model"
        config = dataclasses.replace(config, **{section: change})
    try:
        open_pipeline(config, methods)
    except UserError as other:  # the model given has no blenders, the store no captions: another error
        assert str(other) != str(error.value) and "give --config" not in str(other)


@pytest.mark.slow
def test_too_few_neighbours_name_flags_that_do(folder):
    """Of neighbour sets and of the search for sample grids."""
    from arrag_jax.training.tasks import make_task

    wide = {"faid": {"stride": 1, "hops": (1, 2), "neighbors": workshop.STORED + 1}}
    with pytest.raises(UserError) as error:
        make_task(workshop.config(folder, wide))
    k = int(re.search(r"--config\.retrieval\.k=(\d+)", str(error.value))[1])
    retrieval = RetrievalConfig("store", k, search="dense")
    sets = NeighborsConfig("model", retrieval, "train[:8]", "valid[:8]", workshop.SOURCE, "data")
    build_neighbors.run(sets, "more neighbors")
    with pytest.raises(UserError) as error:
        make_task(workshop.config(folder, wide | {"neighbors": "more neighbors"}))
    k = int(re.search(r"config\.options\.retrieval\.k=(\d+)$", str(error.value))[1])
    search = {"store": "store", "k": k, "search": "dense"}
    make_task(workshop.config(folder, wide | {"neighbors": "more neighbors", "retrieval": search}))


@pytest.mark.slow
def test_the_embedded_model_and_configs_hold_from_any_directory(tmp_path, monkeypatch):
    """A folder of that name below the working directory goes first."""
    monkeypatch.chdir(tmp_path)
    named = runpy.run_path(str(CONFIGS / "emoji_daid.py"))["get_config"]().model
    assert not Path(named).is_absolute()
    embedded = load_tokenizer(named).fingerprint
    flags = ["--config.source=emoji_scenes/tiny", "--config.num_images=4", "--config.indexes=()", "--workdir=store"]
    command = ["python", "-m", "arrag_jax.build_datastore", f"--config={CONFIGS / 'emoji_datastore.py'}", *flags]
    assert run(monkeypatch, shlex.join(command)) == 0
    assert Datastore.open(tmp_path / "store").settings.fingerprint == embedded
    save_model(tiny.janus(), Path(named))
    assert load_model(named).fingerprint == tiny.janus().fingerprint != embedded
