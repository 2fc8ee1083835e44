"""Copies of stored images in a run: found wherever they are moved to, never without one; in true images, too."""

import collections
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax import eval
from arrag_jax.errors import UserError
from arrag_jax.evaluation import measurements, nearest_stored
from arrag_jax.evaluation.benchmarks import open_folder_benchmark
from arrag_jax.evaluation.copy_audit import audited, copies_of
from arrag_jax.evaluation.drawn_folder import hash_of
from arrag_jax.evaluation.feature_store import FeatureStore
from arrag_jax.evaluation.image_codes import add_codes, codes_in
from arrag_jax.evaluation.image_sets import reference_set
from arrag_jax.evaluation.layouts import Flat, Grids, joined
from arrag_jax.evaluation.memorization import moved
from arrag_jax.interfaces import ImageFile, Measurement, Prompt
from helpers import folders, stored

GRID = (6, 7)
NOTHING = Measurement({}, {})


def chunks(codes, size):
    return [codes[i : i + size] for i in range(0, len(codes), size)]


def slow_votes(grid, codes) -> dict[tuple[int, int, int], int]:
    """Equal blocks of an image and of each stored one, by stored image and displacement, place by place."""
    places = list(np.ndindex(GRID[0] - 1, GRID[1] - 1))
    block = lambda codes, at: tuple(codes[at[0] : at[0] + 2, at[1] : at[1] + 2].ravel().tolist())  # noqa: E731
    mine = {place: block(grid, place) for place in places if len(set(block(grid, place))) >= 3}
    often = {b for b, times in collections.Counter(mine.values()).items() if times > 4}
    votes = collections.Counter()
    for number, each in enumerate(codes):
        for there in places:
            for here, value in mine.items():
                if value not in often and value == block(each, there):
                    votes[number, here[0] - there[0], here[1] - there[1]] += 1
    return votes


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (4, 50), (30, 2**22)])
def test_the_nearest_is_that_of_plain_counting(size, at_once, monkeypatch):
    """However many stored images are read, and votes counted, at once."""
    monkeypatch.setattr(nearest_stored, "VOTES", at_once)
    rng = np.random.default_rng(0)
    codes, grids = rng.integers(0, 4, (30, *GRID)), rng.integers(0, 4, (12, *GRID))
    grids[0], grids[1] = codes[7], 3
    grids[2] = np.tile([[0, 1], [2, 3]], (3, 4))[:, : GRID[1]]
    found = nearest_stored.nearest_stored(grids, chunks(codes, size))
    for i, grid in enumerate(grids):
        votes = slow_votes(grid, codes)
        if not votes:
            assert found.number[i] == -1 and found.share[i] == 0
            continue
        best = min(votes, key=lambda key: (-votes[key], key))
        assert (found.number[i], *found.shift[i]) == best
        there = moved(codes[best[0]], *best[1:])
        assert found.share[i] == (there == grid).mean() and found.covered[i] == (there >= 0).mean()
    assert found.number[0] == 7 and found.share[0] == 1 and found.number[1] == -1


def test_a_copy_is_found_at_any_displacement_and_none_where_there_is_none():
    """As long as it covers half of the image; a twentieth of the codes may differ."""
    rng, grid = np.random.default_rng(1), (24, 24)
    codes, plain = rng.integers(0, 3000, (60, *grid)), rng.integers(0, 3000, (40, *grid))
    shifts = [x for x in np.ndindex(47, 47) if (24 - abs(x[0] - 23)) * (24 - abs(x[1] - 23)) >= 288]
    grids = rng.integers(0, 3000, (len(shifts), *grid))
    for i, (down, right) in enumerate(shifts):
        there = moved(codes[i % 60], down - 23, right - 23)
        grids[i] = np.where((there >= 0) & (rng.random(grid) > 0.02), there, grids[i])
    found = nearest_stored.nearest_stored(grids, chunks(codes, 25))
    np.testing.assert_array_equal(found.number, np.arange(len(shifts)) % 60)
    np.testing.assert_array_equal(found.shift, np.array(shifts) - 23)
    whole, anywhere = copies_of(found)
    assert anywhere.all() and len(shifts) > 300
    np.testing.assert_array_equal(whole, found.share >= 0.95)
    assert 1 <= whole.sum() <= 5  # in place, and moved by one
    for stored_codes, drawn in ((codes, plain), (plain, grids), (codes, np.full((3, *grid), 7))):
        assert not np.any(copies_of(nearest_stored.nearest_stored(drawn, chunks(stored_codes, 25))))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored.build(tmp_path_factory.mktemp("store"))


def draw(path, codes, tokenizer="f"):
    info = PngInfo()
    if tokenizer:
        add_codes(info, codes, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path, pnginfo=info)


def score(folder, prompts, **flags):
    """GenEval over a file that detects nothing."""
    file = prompts.parent / "found.jsonl"
    names = [f"{i:05d}/samples/{copy:04d}.png" for i in range(4) for copy in range(2)]
    file.write_text("".join(json.dumps({"filename": name, "detections": []}) + "\n" for name in names))
    given = {"prompts": str(prompts), "copies": 2, "score_only": True, "detector": f"file:{file}", **flags}
    eval.run(None, str(folder), "geneval", "test", 600, 1500, False, False, **given)
    return measurements.read_results(str(folder))


@pytest.fixture
def prompts(tmp_path):
    line = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    (tmp_path / "lines.jsonl").write_text(4 * (json.dumps(line) + "\n"))
    return tmp_path / "lines.jsonl"


def test_a_run_says_how_much_it_copied_and_what(store, prompts, tmp_path, capsys):
    rng, grid = np.random.default_rng(2), store.settings.grid
    for number in range(8):
        codes = store.codes[number] if number in (0, 1, 5) else rng.integers(0, 9, grid)
        for out in "ab":
            drawn = rng.integers(0, 9, grid) if out == "a" and number == 5 else codes
            draw(tmp_path / out / f"{number // 2:05d}" / "samples" / f"{number % 2:04d}.png", drawn)
    a, b = (score(tmp_path / out, prompts, copies_of=str(store.directory)) for out in "ab")
    assert [x["figures"]["copied"]["value"] for x in (a, b)] == [2 / 8, 3 / 8]
    assert b["values"]["copied"]["00000"] == [1, 2] and b["values"]["copied"]["00002"] == [0.5, 2]
    assert b["figures"]["copied"]["low"] < 3 / 8 < b["figures"]["copied"]["high"]
    assert b["images"]["audit"]["fingerprint"] == store.store_fingerprint
    rows = [json.loads(line) for line in (tmp_path / "b" / "copies.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for number in (0, 1, 5):
        assert rows[number]["nearest"] == store.sources[number] and rows[number]["share"] == 1
        assert rows[number]["moved"] == [0, 0] and rows[number]["filename"].endswith(f"{number % 2:04d}.png")
    assert "| copied " in capsys.readouterr().out
    assert "| copied " in measurements.compare(str(tmp_path / "a"), str(tmp_path / "b"))
    without = score(tmp_path / "b", prompts)
    assert "copied" not in without["figures"] and without["images"]["audit"] is None
    assert without["protocol_hash"] == b["protocol_hash"]


def test_the_store_is_that_of_the_run_and_one_that_is_gone_is_told(store, prompts, tmp_path):
    out = tmp_path / "out"
    for number in range(8):
        draw(out / f"{number // 2:05d}" / "samples" / f"{number % 2:04d}.png", store.codes[number])
    drawn = open_folder_benchmark("geneval", str(prompts), 2)
    settings = {"layout": drawn.layout.name, "prompts": hash_of(drawn.prompts), "copies": 2}
    record = {"made_by": "arrag_jax.eval", "version": 1, "settings": {**settings, "store": str(store.directory)}}
    (out / "run.json").write_text(json.dumps(record))
    assert score(out, prompts)["figures"]["copied"]["value"] == 1
    assert "copied" not in score(out, prompts, copies_of="none")["figures"]
    record["settings"]["store"] = str(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(record))
    assert "copies were not looked for: there is no datastore at" in score(out, prompts)["notes"][-1]
    with pytest.raises(UserError, match="gone"):
        score(out, prompts, copies_of=str(tmp_path / "gone"))


class Compared:
    """A benchmark over true images in a folder; ``copies`` images of a prompt stand in one file or in several."""

    def __init__(self, folder, true=None, copies=1):
        self.copies, self.layout = copies, Grids() if copies > 1 else Flat()
        self.prompts, self._true = (), true and (reference_set(str(true))[0], FeatureStore(folder / "kept"))

    def protocol(self):
        return {}

    def measure(self, folder, images, engine):
        return NOTHING

    def true_images(self):
        return self._true


def test_the_images_of_a_grid_are_looked_at_one_by_one(store, tmp_path):
    rng, grid = np.random.default_rng(3), store.settings.grid
    parts = [store.codes[4], rng.integers(0, 9, grid), store.codes[2], store.codes[4]]
    draw(tmp_path / "a.png", joined(parts))
    np.testing.assert_array_equal(codes_in(tmp_path / "a.png")[0], joined(parts))
    draw(tmp_path / "b.png", joined(parts), "another tokenizer")
    images = [ImageFile(Prompt(name, name), f"{name}.png") for name in "ab"]
    measured, _ = audited(NOTHING, tmp_path, images, Compared(tmp_path, copies=4), store)
    assert measured.values["copied"] == {"a": (0.75, 4.0)} and measured.figures["copied"].value == 0.75
    assert "1 images hold no codes of the store's tokenizer: no copies" in measured.notes[0]


@pytest.mark.slow
def test_true_images_and_those_of_other_programs_are_encoded_as_the_store_was(tmp_path):
    """Photos that are also in the store, in larger files than its images."""
    config = folders.config(tmp_path)
    photos = tmp_path / "photos"
    for name in folders.BAD:
        (photos / name).unlink()
    for number in range(21, 23):
        (photos / f"scene_{number}.png").rename(tmp_path / f"scene_{number}.png")
    store = folders.built(config, tmp_path / "store")
    (tmp_path / "true").mkdir()
    for number in (1, 2, 3):
        (photos / f"scene_{number:02d}.png").rename(tmp_path / "true" / f"{number}.png")
    (tmp_path / "scene_21.png").rename(tmp_path / "true" / "21.png")
    drawn = [ImageFile(Prompt(str(i), ""), f"true/{i}.png") for i in (2, 21)]
    measured, _ = audited(NOTHING, tmp_path, drawn, Compared(tmp_path, tmp_path / "true"), store)
    assert measured.figures["true images in the store"].value == 3 / 4
    assert measured.figures["copied"].value == 1 / 2
    rows = [json.loads(line) for line in (tmp_path / "true_copies.jsonl").read_text().splitlines()]
    nearest = {row["filename"]: row["nearest"] for row in rows if row["share"] == 1}
    assert nearest == {f"{number}.png": f"scene_{number:02d}.png" for number in (1, 2, 3)}
    assert any("3 of 4 true images are in the store" in note for note in measured.notes)
    assert any("2 images hold no codes" in note and "were encoded" in note for note in measured.notes)
