"""Prompt sets drawn into folders: only prompt, seed and settings change a byte; runs never mix; pairs."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from arrag_jax import eval
from arrag_jax.command import Flag
from arrag_jax.config import DaidConfig, DrawConfig, MeshConfig, RetrievalConfig, SamplingConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import benchmarks, drawn_folder, measurements
from arrag_jax.evaluation.image_codes import codes_in
from arrag_jax.evaluation.layouts import Flat, GenEvalFolders, Grids, read_rgb
from arrag_jax.evaluation.measurements import figure_of
from arrag_jax.interfaces import FolderBenchmark, Measurement
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.nn.vq import to_uint8
from arrag_jax.signals import Stop
from helpers import stored, tiny
from helpers.drawings import bytes_of

# Of one length, so that runs over some of them share compiled programs.
PROMPTS = ["a cat", "two dogs", "three cats", "a dog", "a car", "two stars", "a house"]
SIZE = (8, 10)  # of the images of the tiny model
LAYOUTS = {"flat": Flat(), "geneval": GenEvalFolders(), "dpg": Grids()}


class Redness:
    """A benchmark of one's own: how red images are."""

    flags: ClassVar = {"form": Flag("layout", "geneval"), "gain": Flag("factor of redness", 1)}

    def __init__(self, prompts, copies, form, gain):
        self.prompts, self.copies, self.layout, self._gain = prompts, copies or 2, LAYOUTS[form], gain

    def protocol(self):
        return {"gain": self._gain}

    def measure(self, folder, images, engine):
        red = {}
        for image in images:
            red.setdefault(image.prompt.name, []).append(self._gain * read_rgb(folder / image.path)[..., 0].mean())
        values = {"red": {name: (float(np.mean(found)), float(len(found))) for name, found in red.items()}}
        return Measurement({"red": figure_of(values, ("red",))}, values)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DrawConfig:
    """Of a tiny model that knows the words of the prompts."""
    folder = tmp_path_factory.mktemp("model")
    language = dataclasses.replace(tiny.CONFIG.language, vocab_size=64)
    save_model(tiny.janus(config=dataclasses.replace(tiny.CONFIG, language=language, pad_id=2)), folder)
    PromptTokenizer.of_words([*PROMPTS, "of"]).save(folder)
    sampling, mesh = SamplingConfig(1.5), MeshConfig(1, 1)
    return DrawConfig(str(folder), RetrievalConfig("none"), sampling=sampling, mesh=mesh, batch_size=4, seed=3)


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "redness", f"{__name__}:Redness")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def run(prompts, out, config, sweep=False, **flags):
    flags = {"method": "plain", "prompts": str(prompts), **flags}
    eval.run(config, str(out), "redness", "test", 600, 1500, sweep, False, **flags)


def test_the_stand_in_is_one(prompts):
    opened = benchmarks.open_folder_benchmark("redness", str(prompts))
    assert isinstance(opened, FolderBenchmark) and opened.copies == 2
    assert set(benchmarks.benchmark_flags()) >= {"form", "gain"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["geneval", pytest.param("dpg", marks=pytest.mark.long)])
def test_batches_and_interruptions_change_no_byte(prompts, config, tmp_path, monkeypatch, form, capfd):
    copies = 4 if form == "dpg" else 2
    run(prompts, tmp_path / "whole", config, form=form, copies=copies)
    whole, table = bytes_of(tmp_path / "whole"), capfd.readouterr().out
    out, real, left = tmp_path / "cut", drawn_folder._Drawer._write, [0]

    def write(self, *words):
        if not left[0]:
            raise Stop(15)
        left[0] -= 1
        real(self, *words)

    monkeypatch.setattr(drawn_folder._Drawer, "_write", write)
    for count in (3, 2, 99):
        left[0] = count
        changed = dataclasses.replace(config, batch_size=4 if count == 3 else 3)
        try:
            run(prompts, out, changed, form=form, copies=copies)
        except Stop:
            assert count < 99
    assert bytes_of(out) == whole
    said = capfd.readouterr()
    assert said.out == table and "continuing: 3 of" in said.err
    if form == "geneval":
        lines = prompts.read_text().splitlines()
        assert [(out / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(7)] == lines
        assert (out / "00006" / "samples" / "0001.png").is_file()
    if form == "dpg":
        assert {Image.open(out / f"{i:05d}.png").size for i in range(7)} == {(20, 16)}


@pytest.mark.slow
def test_a_grid_holds_its_copies_row_by_row(prompts, config, tmp_path):
    run(prompts, tmp_path / "flat", config, form="flat", copies=4, limit=2, draw_only=True)
    run(prompts, tmp_path / "dpg", config, form="dpg", copies=4, limit=2, draw_only=True)
    grid = read_rgb(tmp_path / "dpg" / "00001.png")
    parts = [grid[:8, :10], grid[:8, 10:], grid[8:, :10], grid[8:, 10:]]
    for copy, part in enumerate(parts):
        np.testing.assert_array_equal(part, read_rgb(tmp_path / "flat" / f"00001_{copy:04d}.png"))
    codes, tokenizer = codes_in(tmp_path / "dpg" / "00001.png")
    height, width = codes.shape[0] // 2, codes.shape[1] // 2
    model = load_model(config.model)
    assert tokenizer == model.fingerprint
    for copy in range(4):
        top, left = copy // 2 * height, copy % 2 * width
        part = codes[top : top + height, left : left + width]
        path = tmp_path / "flat" / f"00001_{copy:04d}.png"
        np.testing.assert_array_equal(part, codes_in(path)[0])
        decoded = model.decode_codes(part.reshape(1, -1), height, width)
        np.testing.assert_array_equal(to_uint8(decoded)[0], read_rgb(path))
    assert not (tmp_path / "dpg" / "results.json").exists()


@pytest.mark.slow
def test_a_prompt_has_its_image_whatever_else_is_drawn(prompts, config, tmp_path):
    """Its name, not its place in the set, gives the seed."""
    run(prompts, tmp_path / "all", config, form="flat", copies=1, draw_only=True)
    alone = tmp_path / "one.json"
    alone.write_text(json.dumps({"00001": PROMPTS[1], "00004": PROMPTS[4], "zz": PROMPTS[0]}))
    run(alone, tmp_path / "some", config, form="flat", copies=1, draw_only=True)
    for name in ("00001", "00004"):
        np.testing.assert_array_equal(
            read_rgb(tmp_path / "some" / f"{name}.png"), read_rgb(tmp_path / "all" / f"{name}.png")
        )


@pytest.mark.slow
def test_every_damage_of_a_png_is_seen(prompts, config, tmp_path):
    run(prompts, tmp_path, config, form="flat", copies=1, limit=1, draw_only=True)
    path, rng = tmp_path / "00000.png", np.random.default_rng(0)
    content = path.read_bytes()
    assert drawn_folder.is_whole(path, SIZE)
    for size in [0, 1, 8, 40, *rng.integers(8, len(content), 20).tolist()]:
        path.write_bytes(content[:size])
        assert not drawn_folder.is_whole(path)
    for place in rng.integers(8, len(content), 20).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not drawn_folder.is_whole(path)
    run(prompts, tmp_path, config, form="flat", copies=1, limit=1, draw_only=True)
    assert path.read_bytes() == content


@pytest.mark.slow
def test_runs_do_not_mix(prompts, config, tmp_path):
    out = tmp_path / "out"
    run(prompts, out, config, form="flat", copies=1, limit=2)
    whole = bytes_of(out)
    for changed, flags, named in [
        (dataclasses.replace(config, seed=4), {}, r"seed \(3 there, 4 now\)"),
        (config, {"copies": 2}, r"copies \(1 there, 2 now\)"),
        (config, {"limit": 3}, r"num_prompts \(2 there, 3 now\)"),
        (config, {"form": "geneval"}, r"layout \(.flat. there, .geneval. now\)"),
    ]:
        with pytest.raises(UserError, match=f"out holds images of another run: .*{named}"):
            run(prompts, out, changed, **{"form": "flat", "copies": 1, "limit": 2, **flags})
    with pytest.raises(UserError, match=r"another run \(prompts differ\); give its own flags"):
        run(prompts, out, None, form="flat", copies=1, limit=1, score_only=True)
    with pytest.raises(UserError, match=r"another run \(layout differ\); give its own flags"):
        run(prompts, out, None, form="geneval", score_only=True)
    Image.new("RGB", (11, 8)).save(out / "00000.png")
    with pytest.raises(UserError, match=r"00000\.png has 8 x 11 pixels, where this run draws 8 x 10"):
        run(prompts, out, config, form="flat", copies=1, limit=2)
    (out / "00000.png").unlink()
    run(prompts, out, config, form="flat", copies=1, limit=2)
    assert bytes_of(out) == whole


@pytest.mark.slow
def test_a_folder_knows_its_prompts(prompts, config, tmp_path):
    """Scoring needs no flag that drawing had; prompts that are gone or changed are told."""
    out = tmp_path / "out"
    run(prompts, out, config, form="flat", copies=1, limit=2)
    whole, text = bytes_of(out), prompts.read_text()
    (out / "results.json").unlink()
    run("", out, None, form="flat", method="", score_only=True)
    assert bytes_of(out) == whole
    prompts.write_text(text.replace("two dogs", "two cats"))
    for given in ("", prompts):
        with pytest.raises(UserError, match=r"prompts\.jsonl has changed since .*out was drawn from it"):
            run(given, out, None, form="flat", method="", score_only=True)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(text)
    prompts.unlink()
    with pytest.raises(UserError, match=r"out was drawn from .*prompts\.jsonl, which is gone; give its copy"):
        run("", out, None, form="flat", method="", score_only=True)
    run(moved, out, None, form="flat", method="", score_only=True)
    assert bytes_of(out) == whole
    run(moved, out, config, form="flat", copies=1, limit=2)
    run("", out, None, form="flat", method="", score_only=True)


def test_images_of_another_program_are_scored_and_missing_ones_named(prompts, tmp_path, capsys):
    for number in range(6):
        Image.new("RGB", (20, 30), (10 * number, 0, 0)).save(tmp_path / f"{number:05d}.png")
    flags = {"form": "flat", "copies": 1, "score_only": True}
    with pytest.raises(UserError, match=r"lacks 1 of 7 images: 00006\.png; draw them, or give --allow_missing"):
        run(prompts, tmp_path, None, **flags)
    run(prompts, tmp_path, None, allow_missing=True, **flags)
    record = measurements.read_results(str(tmp_path))
    assert record["figures"]["red"]["value"] == 25 and record["images"]["drawn"] is None
    assert record["images"]["missing"] == ["00006.png"]
    assert "note: 1 of 7 images are missing and not scored: 00006.png" in capsys.readouterr().out


def test_two_runs_are_compared_prompt_by_prompt(prompts, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for out, added in (("a", 0), ("b", 3)):
        (tmp_path / out).mkdir()
        for number in range(7):
            shade = 30 * number + added + int(rng.integers(0, 2))
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / out / f"{number:05d}.png")
        run(prompts, tmp_path / out, None, form="flat", copies=1, score_only=True)
    capsys.readouterr()
    eval.run(None, "", "emoji_scenes", "test", 1, 3, False, False, compare=[str(tmp_path / out) for out in "ab"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| red "))
    a, b = (measurements.read_results(str(tmp_path / out)) for out in "ab")
    both = [[record["values"]["red"][f"{n:05d}"][0] for n in range(7)] for record in (a, b)]
    assert f"{np.mean(both[1]) - np.mean(both[0]):+.4g} [" in row and row.rstrip("| ").endswith("yes")
    assert b["figures"]["red"]["low"] < a["figures"]["red"]["high"]  # unpaired, nothing could be said
    run(prompts, tmp_path / "b", None, form="flat", copies=1, score_only=True, gain=2)
    with pytest.raises(UserError, match="were not measured in the same way: gain differ"):
        measurements.compare(str(tmp_path / "a"), str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompts": ""}, "redness needs a prompt set"),
        ({"copies": -1}, "--copies=-1 must be at least 0"),
        ({"draw_only": True, "score_only": True}, "exclude one another"),
        ({"config": None}, "missing --config"),
        ({"compare": ["a"]}, "--compare needs two folders, and 1 are given"),
    ],
)
def test_flags_that_do_not_go_together(prompts, config, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(**{"config": config, "prompts": prompts, "out": tmp_path / "out", **flags})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unknown_words_are_left_out_on_request_alone(prompts, config, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a photo of a cat")
    with pytest.raises(UserError, match="does not know 'photo'"):
        run(path, tmp_path / "out", config, form="flat", copies=1, draw_only=True)
    run(path, tmp_path / "out", config, form="flat", copies=1, draw_only=True, known_words=True)
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.text["prompt"] == "a photo of a cat"
    known = tmp_path / "known.txt"
    known.write_text("a of a cat")
    run(known, tmp_path / "known", config, form="flat", copies=1, draw_only=True)
    np.testing.assert_array_equal(read_rgb(tmp_path / "known" / "00000.png"), read_rgb(tmp_path / "out" / "00000.png"))


def test_seeds_are_spread():
    seeds = {drawn_folder.seed_of(0, f"{i:05d}", copy) for i in range(553) for copy in range(4)}
    assert len(seeds) == 2212 and max(seeds) > 2**30


@pytest.mark.slow
def test_a_sweep_measures_what_each_setting_gives_alone(prompts, config, tmp_path, capsys):
    """λ = 0 draws what plain draws; a sweep that is run again draws and scores nothing."""
    store = stored.build(tmp_path / "store", fingerprint=load_model(config.model).fingerprint)
    swept = dataclasses.replace(config, retrieval=RetrievalConfig(str(store.directory), k=8, search="dense"))
    flags = {"form": "flat", "copies": 1, "limit": 3, "method": ""}
    values = {"sweep_weights": "0,0.9", "sweep_temperatures": "0.5", "sweep_seeds": 2}
    out = tmp_path / "sweep"
    for _ in range(2):
        run(prompts, out, swept, sweep=True, **values, **flags)
        said, whole = capsys.readouterr().out, bytes_of(out)
    assert whole == bytes_of(out)
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert list(rows) == ["plain", "weight0_temperature0.5", "weight0.9_temperature0.5"]
    for label, row in rows.items():
        folders = [out / label / f"seed{seed}" for seed in (3, 4)]
        records = [measurements.read_results(str(folder)) for folder in folders]
        assert row["by_seed"]["red"] == [record["figures"]["red"]["value"] for record in records]
        assert row["figures"]["red"]["value"] == pytest.approx(np.mean(row["by_seed"]["red"]))
        assert row["figures"]["red"]["low"] <= row["figures"]["red"]["value"] <= row["figures"]["red"]["high"]
    for seed in (3, 4):
        for name in ("00000", "00001", "00002"):
            pixels = [read_rgb(out / label / f"seed{seed}" / f"{name}.png") for label in rows]
            np.testing.assert_array_equal(pixels[0], pixels[1])
    assert rows["plain"]["by_seed"]["red"] != rows["weight0.9_temperature0.5"]["by_seed"]["red"]
    lines = [line for line in said.splitlines() if line.startswith("| 0")]
    assert "+0 [+0, +0]" in lines[0] and "copied" in said and "± over 2 seeds" in said
    alone = dataclasses.replace(swept, seed=4, daid=DaidConfig(0.9, 0.5))
    run(prompts, tmp_path / "alone", alone, **{**flags, "method": "daid"})
    drawn = out / "weight0.9_temperature0.5" / "seed4"
    np.testing.assert_array_equal(read_rgb(drawn / "00001.png"), read_rgb(tmp_path / "alone" / "00001.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--sweep needs values; give at least one of --sweep_weights, --sweep_temp"),
        ({"sweep_weights": "0.1;0.2"}, "--sweep_weights='0.1;0.2' are no numbers"),
        ({"sweep_weights": "0.1", "method": "plain"}, "--method=plain does not retrieve"),
        ({"sweep_weights": "0.1", "method": "faid"}, "--method=faid has no weight; leave out --sweep_weights"),
        ({"sweep_weights": "1.5"}, "DAiD's weight λ = 1.5 is outside"),
        ({"sweep_neighbors": "8", "score_only": True}, "--sweep draws and scores"),
        ({"sweep_neighbors": "8", "config": None}, "missing --config"),
    ],
)
def test_sweeps_that_are_none(prompts, config, tmp_path, flags, message):
    given = {"config": config, "prompts": prompts, "out": tmp_path / "out", "method": "", "sweep": True, **flags}
    with pytest.raises(UserError, match=message):
        run(**given)
    assert not (tmp_path / "out").exists()
