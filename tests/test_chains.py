"""What one command writes the next ones take: the shipped configs in a row, as a user types them, in few steps."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arrag_jax.data.emoji.scenes import scene
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.models.tensor_files import read_tensors, stored_tensors
from arrag_jax.store.datastore import Datastore
from helpers import tiny
from helpers.folders import write_scenes
from helpers.in_turn import run_in_turn
from helpers.published import write_checkpoint

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.long]


def command(name: str, config: str, workdir: str, *flags: str) -> str:
    """A command with a shipped config."""
    words = ["python", "-m", f"arrag_jax.{name}", "--config", str(CONFIGS / f"{config}.py"), f"--workdir={workdir}"]
    return shlex.join([*words, *(f"--config.{x}" if not x.startswith("--") else x for x in flags)])


def convert(source: str, target: str, *flags: str) -> str:
    return shlex.join(["python", "-m", "arrag_jax.convert", "--source", source, "--target", target, *flags])


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))}


def commands_in(message: str) -> list[str]:
    """The commands that an error names, up to the punctuation that ends them."""
    return [found.rstrip(".,;)") for found in re.findall(r"python -m arrag_jax\.[^;()\n]*", message)]


FEW = ("steps=2", "batch_size=4", "data.eval_examples=8")
TINY = ("data.source=emoji_scenes/tiny",)
DRAW = ("model=runs/prior/export", "retrieval.k=16", "data.source=emoji_scenes/tiny")
LIMITED = ("caption.images=8", "caption.static_images=3")
CATS = ("--prompt=a cat", "--prompt=two dogs", "--noprovenance")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """tokenizer → prior → store → neighbours → FAiD and its control, each by its config, in one folder."""
    folder = tmp_path_factory.mktemp("emoji")
    tuned = ("faid.neighbors=4", "faid.stride=6", "lora.rank=2", "retrieval.k=16", "base=runs/prior/export")
    tuned = [*FEW, *(f"options.{flag}" for flag in tuned)]
    scenes = ("source=emoji_scenes/tiny", "num_images=20")
    neighbors = ("source=emoji_scenes/tiny", "train_split=store[20:32]", "valid_split=valid[:8]")
    done = run_in_turn(
        folder,
        command("train", "emoji_tokenizer", "runs/tokenizer", *FEW, *TINY),
        command("train", "emoji_prior", "runs/prior", *FEW, *TINY),
        command("build_datastore", "emoji_datastore", "runs/store", "model=runs/tokenizer/export", *scenes),
        command(
            "build_neighbors", "emoji_neighbors", "runs/neighbors", "model=runs/prior", "retrieval.k=8", *neighbors
        ),
        command("train", "emoji_faid", "runs/faid", *tuned),
        command("train", "emoji_lora_only", "runs/lora_only", *tuned),
        command("generate", "emoji_compare", "drawn", *DRAW, *CATS),
    )
    for train in (*done[:2], *done[4:6]):  # its last line: what was reached, and where it is
        workdir = re.search(r"--workdir=(\S+)", train.command)[1]
        figures = json.loads((folder / workdir / "export" / "manifest.json").read_text())["figures"]
        last = train.out.splitlines()[-1]
        assert last.startswith("trained 2 steps; held out: ") and last.endswith(f"the model is in {workdir}/export")
        assert all(f"{name} {value:g}" in last for name, value in figures.items())
    return folder


class TestEmoji:
    """The embedded model's own way, from its first training on."""

    def test_the_tokenizers_store_is_drawn_from_by_all_methods(self, emoji):
        run_in_turn(
            emoji,
            command("generate", "emoji_caption", "captions", *DRAW, *CATS, *LIMITED, "methods=static,caption"),
            command("eval", "emoji_daid", "measured", *DRAW, "--num_prompts=0", "--num_scenes=3"),
        )
        names = ("plain", "daid", "lora", "faid", "faid+daid")
        assert pictures(emoji / "drawn").keys() == {f"0{i}_{name}.png" for i in (0, 1) for name in names}
        limited = {f"0{i}_{name}.png" for i in (0, 1) for name in ("static", "caption")}
        assert pictures(emoji / "captions").keys() == limited
        assert (emoji / "measured" / "results.json").exists()

    def test_what_is_converted_draws_the_same(self, emoji):
        """The newest checkpoint by ``convert`` is the export; there and back through the published layout, too."""
        tuned = ("faid_model=published/faid", "methods=plain,faid")
        run_in_turn(
            emoji,
            *(convert(f"runs/{name}", f"best/{name}") for name in ("tokenizer", "prior")),
            *(convert(f"runs/{name}", f"last/{name}", "--last") for name in ("prior", "faid")),
            convert("last/faid", "published/faid", "--to=janus"),
            convert("last/prior", "published/prior", "--to=janus"),
            convert("published/prior", "ours/prior"),
            convert("best/tokenizer", "published/tokenizer", "--to=janus"),
            convert("published/tokenizer", "ours/tokenizer"),
            command("generate", "emoji_compare", "again", "model=ours/prior", *DRAW[1:], *CATS, *tuned),
        )
        trained = load_tokenizer(emoji / "runs" / "tokenizer").fingerprint
        for folder in ("ours/tokenizer", "published/tokenizer", "best/prior"):
            assert load_tokenizer(emoji / folder).fingerprint == trained
        again = pictures(emoji / "again")
        assert again.keys() == {f"0{i}_{name}.png" for i in (0, 1) for name in ("plain", "faid")}
        for name, picture in again.items():
            np.testing.assert_array_equal(picture, pictures(emoji / "drawn")[name])

    def test_every_model_is_one_to_start_from_and_to_store_with(self, emoji):
        """Run, export and converted folder alike."""
        scenes, start = ("source=emoji_scenes/tiny", "num_images=8", "indexes=()"), "init_from=runs/prior/export"
        models = ("runs/prior", "runs/faid/export", "runs/lora_only")
        done = run_in_turn(
            emoji,
            command("train", "emoji_tokenizer", "more/tokenizer", *FEW, *TINY, start, "steps=1"),
            command(
                "train", "emoji_prior", "more/prior", *FEW, *TINY, start, "steps=1", "options.tokenizer=runs/prior"
            ),
            *(
                command("build_datastore", "emoji_datastore", f"stores/{i}", f"model={model}", *scenes)
                for i, model in enumerate(models)
            ),
        )
        assert all("starting from the weights in runs/prior/export" in train.err for train in done[:2])
        stores = [Datastore.open(emoji / f"stores/{i}") for i in range(3)]
        assert all(store.store_fingerprint == stores[0].store_fingerprint for store in stores)

    def test_a_tokenizer_alone_does_not_draw_and_says_what_does(self, emoji):
        """One line, before anything is written; the command that it names trains what draws."""
        alone = "runs/tokenizer/export"
        refused = run_in_turn(
            emoji,
            command("generate", "emoji_daid", "none", f"model={alone}", *CATS),
            command("generate", "emoji_compare", "none", *DRAW, f"faid_model={alone}", *CATS),
            command("eval", "emoji_daid", "none", f"model={alone}", "data.source=emoji_scenes/tiny"),
            command("train", "emoji_faid", "none", *FEW, f"options.base={alone}"),
            command("train", "emoji_prior", "refused", *FEW, *TINY, f"init_from={alone}"),
            needed=False,
        )
        for done in refused[:-1]:
            assert done.code == 2 and done.err.count("\n") == 1, done
            assert f"{alone} holds an image tokenizer alone" in done.err
            (mend,) = commands_in(done.err)
            assert f"--config.options.tokenizer={alone}" in mend
        assert refused[-1].code == 2 and "does not hold" in refused[-1].err
        mend = mend.replace("configs/", f"{CONFIGS}/").replace("runs/prior", "mended")
        run_in_turn(emoji, shlex.join([*shlex.split(mend), *(f"--config.{flag}" for flag in (*FEW, *TINY))]))
        assert load_model(emoji / "mended").language_model is not None
        assert not (emoji / "none").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with such a checkpoint and captioned photos."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder / "checkpoints" / "janus-pro-1b")
    write_scenes(folder / "photos", [0, 1, 2, 3, 4, *range(6, 11), *range(12, 24)])
    for path in (folder / "photos").glob("*.png"):
        path.with_suffix(".txt").write_text(scene("store", int(path.stem[-2:])).caption)
    return folder


def test_a_folder_of_images_and_a_published_checkpoint_draw_with_every_method(published):
    """The store is the plain one of a folder; the errors' own commands give it what Janus-Pro's configs search."""
    store, small = "stores/janus-pro-1b", ("retrieval.k=16", *LIMITED)
    draw = command("generate", "janus_pro_1b", "drawn", *small, *CATS)
    captions = command("generate", "janus_pro_1b", "captions", *small, *CATS, "--method=static")
    first = run_in_turn(
        published,
        command("build_datastore", "folder_datastore", store, "source=photos", "model=checkpoints/janus-pro-1b"),
        command("generate", "janus_pro_1b", "plain", *CATS, "--method=plain"),
        draw,
        captions,
        needed=False,
    )
    assert [done.code for done in first] == [0, 0, 2, 2]
    mends = [commands_in(done.err)[0] for done in first[2:]]
    tuned = ("options.retrieval.k=16", "options.lora.rank=2", "steps=2", "batch_size=4", "accumulate=2")
    tuned += ("data.eval_examples=4",)
    splits = ("source=photos", "train_split=train[:-6]", "valid_split=train[-6:]", "batch_size=4")
    everything = ("faid_model=faid/export", "lora_model=published/lora")
    run_in_turn(
        published,
        *mends,
        draw,
        captions,
        command("build_neighbors", "janus_pro_1b_neighbors", "neighbors/janus-pro-1b", *splits),
        command("train", "janus_pro_1b_faid", "faid", *tuned),
        command("train", "janus_pro_1b_faid", "lora", *tuned, "options.blend=False"),
        convert("lora", "best/lora"),
        convert("best/lora", "published/lora", "--to=janus"),
        # Whose blenders are trained further, with the export as its base.
        command("train", "janus_pro_1b_faid", "further", *tuned, "options.base=faid/export"),
        command("generate", "janus_pro_1b", "every", *small, *CATS, *everything),
        command("build_datastore", "janus_pro_1b_datastore", "stores/at_once", "source=photos", "captions=True"),
        command("generate", "janus_pro_1b", "at_once", *small, *CATS, "retrieval.store=stores/at_once", "methods=daid"),
    )
    every = pictures(published / "every")
    assert {name.partition("_")[2] for name in every} == {
        f"{name}.png" for name in ("plain", "daid", "lora", "faid", "faid+daid")
    }
    for name, picture in pictures(published / "at_once").items():
        np.testing.assert_array_equal(picture, every[name])
    assert {"00_static.png", "01_static.png"} == pictures(published / "captions").keys()


def test_there_and_back_through_the_published_layout_every_byte_of_a_tokenizer_is_the_same(tmp_path):
    save_model(tiny.janus(parts=VISION), tmp_path / "alone")
    run_in_turn(
        tmp_path,
        convert("alone", "janus", "--to=janus"),
        convert("janus", "ours"),
        convert("ours", "janus2", "--to=janus"),
    )
    sets = [dict(read_tensors(stored_tensors(tmp_path / name))) for name in ("alone", "janus", "ours", "janus2")]
    for each in sets[1:]:
        assert each.keys() == sets[0].keys()
        assert all(each[key].tobytes() == value.tobytes() for key, value in sets[0].items())
