"""Laws of image sources: what a store can be built from can be trained on, and what cannot be read ends no run."""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_chains import command, pictures
from test_prepared import Pets
from test_tasks import PRESET

from arrag_jax.config import DataConfig, OptimizerConfig, TrainConfig
from arrag_jax.data.emoji import scenes
from arrag_jax.data.examples import BadImage, Images, Source
from arrag_jax.data.loader import make_loader
from arrag_jax.data.readable import ReadableImages
from arrag_jax.data.registry import open_images, open_source
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.janus import VISION
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.text import PromptTokenizer, words_in
from arrag_jax.parsing import parse
from arrag_jax.training.checkpoint import claimed, read_config
from arrag_jax.training.tasks import make_task
from helpers import folders, malformed, tiny
from helpers.in_turn import run_in_turn

SIZE = (12, 12)
CAPTIONS = ["A dog's ball.", "two dogs; a Cat", "", "a cat", "…", "a zebra and a cat", "zebras!"]
ASSETS = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"


def write_captioned(folder: Path, captions: list[str]) -> Path:
    """A folder of images, with a text file beside each that has a caption."""
    folder.mkdir()
    for number, caption in enumerate(captions):
        image = malformed.photo(size=(20 + number, 31), seed=number)
        (folder / f"{number:02d}.png").write_bytes(malformed.encoded("PNG", image))
        if caption:
            (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


def pack(folder: Path) -> Path:
    """The folder as a tar beside it."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A function from a task's name, a source and changes of its data to the task, by a tiny preset."""
    PRESETS["tiny"] = PRESET
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    save_model(tiny.janus(config=PRESET, parts=VISION), tokenizer)

    def config(task: str, source: str, prompt_length: int = 16, **data) -> TrainConfig:
        options = {"preset": "tiny"} | ({"tokenizer": str(tokenizer)} if task == "prior" else {})
        if task == "prior":
            options["prompt_length"] = prompt_length
        return TrainConfig(
            task=task, steps=2, batch_size=2, options=options, data=DataConfig(source, **data),
            optimizer=OptimizerConfig(warmup_steps=1),
        )  # fmt: skip

    yield config
    del PRESETS["tiny"]


@pytest.mark.slow
def test_every_source_gives_named_and_captioned_images(tmp_path):
    folder = write_captioned(tmp_path / "photos", CAPTIONS)
    Pets(config="small", data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    found = {}
    for source, split in (
        (str(folder), "train[1:4]"),
        (str(pack(folder)), "train[1:4]"),
        ("tfds:pets/small", "train[1:4]"),
        ("emoji_scenes/tiny", "valid[1:4]"),
    ):
        size = (48, 48) if source.startswith("emoji") else SIZE
        opened = open_source(source, tmp_path, size, captions=True)
        images = opened.images(split)
        assert isinstance(opened, Source) and isinstance(images, Images) and len(images) == 3
        assert all(images[i]["image"].shape == (*size, 3) for i in range(3))
        found[source] = [(images.source_id(i), images.caption(i)) for i in range(3)]
    names, tar, pets, emoji = found.values()
    assert names == [(f"{i:02d}.png", CAPTIONS[i]) for i in (1, 2, 3)]
    assert tar == [(f"photos.tar!{name}", caption) for name, caption in names]
    assert pets == [(f"tfds:pets/small/train/{i}", f"pet {i}") for i in (1, 2, 3)]
    assert emoji == [(f"emoji_scenes/tiny/valid/{i}", scenes.scene("valid", i).caption) for i in (1, 2, 3)]


def test_what_is_not_there_is_named(tmp_path):
    folder = str(write_captioned(tmp_path / "photos", ["a cat"] * 3))
    with pytest.raises(UserError, match=r'photos has no valid: its 3 images form one split, "train".*"train\[:-64\]"'):
        open_images(folder, "valid", tmp_path, SIZE)
    with pytest.raises(UserError, match="photos has no valid"):
        make_task(TrainConfig("tokenizer", 1, 1, {"preset": "janus-emoji"}, DataConfig(folder)))
    with pytest.raises(UserError, match="unknown data set 'emoji_scenes/huge'; take one of emoji_scenes/full"):
        open_source("emoji_scenes/huge", tmp_path, SIZE)
    with pytest.raises(UserError, match=r"^config\.data\.source=nowhere does not exist"):
        open_source("nowhere", tmp_path, SIZE, key="config.data.source")
    with pytest.raises(UserError, match=r"unknown key config\.name \(it is called source now\)"):
        parse(DataConfig, {"name": "emoji_scenes/full"})


class Rows:
    """Images 0 … n - 1, some of which cannot be read."""

    def __init__(self, count: int, bad: set[int]):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage("empty file")
        return {"id": np.int32(index)}

    def source_id(self, index):
        return f"{index}.png"

    def caption(self, index):
        return ""


def test_an_unreadable_image_is_named_once_and_the_next_one_stands_in_its_place(capsys):
    images = ReadableImages(Rows(40, {5, 6, 39}), 0.1, 0)
    for _ in range(2):
        wanted = [7 if i in (5, 6) else 0 if i == 39 else i for i in range(40)]
        assert [images[i]["id"] for i in range(40)] == wanted
    assert [example["id"] for example in images.first(8)] == [0, 1, 2, 3, 4, 7]
    assert sorted(capsys.readouterr().err.splitlines()) == [f"skipped {i}.png: empty file" for i in (39, 5, 6)]


def test_the_loader_resumes_to_the_example_among_unreadable_images():
    def ids(loader, count):
        return [next(loader)["id"].tolist() for _ in range(count)]

    def loader(threads: int):
        return make_loader(ReadableImages(Rows(12, {3, 8}), 0.5, 0), 4, seed=3, threads=threads)

    begun = loader(2)
    first, state = ids(begun, 4), begun.get_state()
    resumed = loader(1)
    resumed.set_state(state)
    assert ids(resumed, 5) == ids(begun, 5)
    assert not {3, 8} & set(np.concatenate(first).tolist())


@pytest.mark.parametrize(
    "rows, message",
    [
        (Rows(40, {1, 2, 3}), r"3 of 40 images cannot be read \(1\.png: empty file; .*max_bad_fraction=0\.05 allows"),
        (Rows(2, {0, 1}), r"none of the 2 images can be read \(0\.png: empty file; .*is config\.data\.source right\?"),
    ],
)
def test_too_many_unreadable_images_end_the_run(rows, message):
    images = ReadableImages(rows, 0.05, 2)
    with pytest.raises(UserError, match=message):
        [images[i] for i in range(len(images))]


@pytest.mark.slow
def test_the_emoji_priors_vocabulary_is_that_of_the_embedded_checkpoint(tiny_run, tmp_path):
    """To the byte, whatever the size and the slice; and it is exactly the words of the training split's captions."""
    captions = [scenes.scene("train", index).caption for index in range(600)]
    assert {word for caption in captions for word in words_in(caption)} == set(scenes.words())
    for name, split in (("emoji_scenes/full", "train"), ("emoji_scenes/tiny", "train[:3]")):
        make_task(tiny_run("prior", name, train_split=split)).text.save(tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer.json").read_bytes()
    PromptTokenizer.of_words(captions).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_folders_vocabulary_is_the_words_of_its_training_captions(tiny_run, tmp_path, capsys):
    folder = write_captioned(tmp_path / "photos", CAPTIONS)
    splits = {"train_split": "train[:5]", "eval_split": "train[5:]"}
    task = make_task(tiny_run("prior", str(folder), **splits))
    assert task.words == {"a", "dog", "s", "ball", "two", "dogs", "cat"}
    assert len(task.train_source()) == 3  # "" and "…" are no prompts
    (batch,) = task.eval_batches(8)
    text = task.text.tokenizer
    spoken = [
        [text.id_to_token(i) for i in ids[mask]][3:-3]
        for ids, mask in zip(*map(batch.get, ("prompt_ids", "prompt_mask")), strict=True)
    ]
    assert spoken == [["a", "a", "cat"]]  # "zebra" and "and" stand in no training caption; of "zebras!" nothing is left
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"2 of the 5 images in train[:5] of {folder} have no caption and are left out",
        f"1 of the 2 images in train[5:] of {folder} have no caption and are left out",
    ]
    assert task.text(["A dog's ball!"])[0].tolist() == task.text(["a dog s ball"])[0].tolist()
    with pytest.raises(UserError, match=r"prompt_length=8 is too short: the prompt of 00\.png has 10 tokens"):
        make_task(tiny_run("prior", str(folder), 8, **splits))
    with pytest.raises(UserError, match=r"no image in train\[2:3\] of .*photos has a caption"):
        make_task(tiny_run("prior", str(folder), train_split="train[2:3]"))


def test_a_run_on_files_is_not_continued_on_others(tiny_run, tmp_path):
    """What its images and captions are is part of what it began with; of the emoji scenes the name tells that."""
    folder = write_captioned(tmp_path / "photos", ["a cat"] * 4)
    before = [
        make_task(tiny_run(name, str(folder), eval_split="train")).base()["data"] for name in ("tokenizer", "prior")
    ]
    (folder / "01.txt").write_text("a dog")
    after = [
        make_task(tiny_run(name, str(folder), eval_split="train")).base()["data"] for name in ("tokenizer", "prior")
    ]
    assert before[0] == after[0] and before[1] != after[1]
    (folder / "02.png").unlink()
    assert make_task(tiny_run("tokenizer", str(folder), eval_split="train")).base()["data"] != after[0]
    assert make_task(tiny_run("tokenizer", "emoji_scenes/tiny")).base() == {}


def test_a_run_of_an_earlier_version_goes_on(tiny_run, tmp_path):
    """Its record calls the source "name" and knows nothing of bad images."""
    config = tiny_run("tokenizer", "emoji_scenes/tiny")
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    data = record["data"]
    record["data"] = {"name": data.pop("source"), **{k: v for k, v in data.items() if "bad" not in k}}
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_config(tmp_path).data == config.data
    with claimed(tmp_path, config, {}):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["data"]["source"] == "emoji_scenes/tiny"


def test_the_images_of_a_run_are_those_of_a_store(tiny_run, tmp_path):
    """Photos are scaled and cropped alike; of the held-out ones those that cannot be read are left out."""
    folder = folders.write_scenes(tmp_path / "photos", range(12))
    task = make_task(tiny_run("tokenizer", str(folder), eval_split="train", eval_examples=8, max_bad_fraction=0.2))
    (batch,) = task.eval_batches(8)
    images = open_images(str(folder), "train", tmp_path, PRESET.image_size)
    np.testing.assert_array_equal(batch["image"], [images[i]["image"] for i in (0, 1, 2, 3, 4, 6, 7)])
    assert len(task.train_source()) == 12
    (folder / "scene_00.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the first 1 held-out images can be read"):
        list(make_task(tiny_run("tokenizer", str(folder), eval_split="train", eval_examples=1)).eval_batches(8))


@pytest.mark.long
@pytest.mark.slow
def test_a_captioned_folder_trains_a_tokenizer_and_a_prior_and_draws(photos, tmp_path):
    """By the commands, on photos with a bad one among them; and the store of the same folder is searched."""
    (tmp_path / "photos").mkdir()
    with tarfile.open(photos / "flickr8k_train_128.tar") as tar:
        for number in range(24):
            member = tar.next()
            if member.name.endswith(".jpg"):
                (tmp_path / "photos" / member.name).write_bytes(tar.extractfile(member).read())
                (tmp_path / "photos" / member.name).with_suffix(".txt").write_text(f"photo number {number % 4}")
    (tmp_path / "photos" / "empty.jpg").write_bytes(b"")
    (tmp_path / "photos" / "empty.txt").write_text("photo number 0")
    drawn = "model=runs/prior/export"
    few = ("steps=3", "batch_size=4", "data.source=photos", "data.train_split=train[:8]", "data.eval_split=train[8:]")
    done = run_in_turn(
        tmp_path,
        command("train", "emoji_tokenizer", "runs/tokenizer", *few),
        command("train", "emoji_prior", "runs/prior", *few),
        command("build_datastore", "folder_datastore", "runs/store", drawn, "source=photos", "indexes=()"),
        command("generate", "emoji_daid", "drawn", drawn, "retrieval.search=dense", "--prompt=Photo number 2!"),
    )  # fmt: skip
    for trained in done[:2]:
        assert trained.out.splitlines()[-1].startswith("trained 3 steps; held out: ")
        assert trained.err.count("skipped empty.jpg: empty file") == 1
    assert pictures(tmp_path / "drawn").keys() == {"00_plain.png", "00_daid.png"}
