"""Laws of the split ``knowledge`` and of the long-tailed world: who is shown where, how often, and what is found."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_detector import as_a_tokenizer_might

from arrag_jax.config import DataSetConfig
from arrag_jax.data.emoji import dataset, scenes
from arrag_jax.data.emoji.classes import COLOURS, SPRITES, SpriteClass
from arrag_jax.data.emoji.scenes import Scene, render, scene
from arrag_jax.data.emoji.worlds import FAMILIES, HELD_OUT_FAMILIES, LONG_TAIL, PERIOD, STANDARD, World
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.emoji.detector import detect
from arrag_jax.evaluation.emoji.object_score import object_score
from arrag_jax.interfaces import ImageBatch

PER_SPLIT = 360
WORLDS = [pytest.param(STANDARD, id="standard"), pytest.param(LONG_TAIL, id="long_tail")]
HEAD, TAIL, ABSENT = LONG_TAIL.groups.values()


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Scene]]:
    """The first scenes of each split of the long-tailed world."""
    return {split: [scene(split, i, LONG_TAIL) for i in range(PER_SPLIT)] for split in LONG_TAIL.splits}


def shown(s: Scene) -> set[str]:
    """The classes of a scene."""
    return {sprite.name for sprite in s.sprites}


def true_images(split: str, count: int, world: World) -> tuple[list[Scene], np.ndarray]:
    some = [scene(split, index, world) for index in range(count)]
    return some, np.stack([render(s) for s in some])


def test_every_class_is_in_one_group():
    assert HEAD + TAIL + ABSENT == tuple(SPRITES) == tuple(LONG_TAIL.classes) and len(SPRITES) == 64
    assert [len(names) for names in (HEAD, TAIL, ABSENT)] == [24, 28, 12]
    assert set(STANDARD.classes) <= set(HEAD)
    assert {name: LONG_TAIL.group_of(name) for name in ("cat", "bow", "banana")} == {
        "cat": "head", "bow": "tail", "banana": "absent",
    }  # fmt: skip


def test_words_name_every_class_once():
    """No word names two classes, and each word is one token of the vocabulary."""
    names = list(itertools.chain(*({entry.name, entry.plural} for entry in SPRITES.values())))
    assert len(names) == len(set(names)) and not set(names) & set(COLOURS)
    assert all(name.isalpha() and name.islower() for name in names)
    assert set(names) < set(scenes.words(LONG_TAIL)) and set(scenes.words()) < set(scenes.words(LONG_TAIL))
    assert "giraffe" in scenes.words(LONG_TAIL) and "giraffe" not in scenes.words()


def natural_by_area(entry: SpriteClass) -> tuple[str, ...]:
    """The colours that cover a quarter of a sprite or more, by hue; brown counts as none."""
    pixels = np.array(Image.open(scenes._sprite_folder() / f"{entry.file}.png").convert("RGBA"))
    hue, saturation, value = np.moveaxis(np.array(Image.fromarray(pixels[..., :3]).convert("HSV"), float), -1, 0) / 255
    degrees, alpha = 360 * hue, pixels[..., 3] / 255
    brown = (degrees >= 8) & (degrees < 45) & (value < 0.9)
    coloured = alpha * ((saturation > 0.2) & (value > 0.35) & ~brown)
    starts = {"red": 320, "yellow": 20, "green": 70, "blue": 165, "purple": 250}
    ends = {"red": 380, "yellow": 70, "green": 165, "blue": 250, "purple": 320}
    share = {name: (coloured * ((degrees - starts[name]) % 360 < ends[name] - starts[name])).sum() for name in COLOURS}
    return tuple(name for name in COLOURS if share[name] >= alpha.sum() / 4)


@pytest.mark.parametrize("name", SPRITES)
def test_natural_colours_follow_the_rule(name):
    assert SPRITES[name].natural == natural_by_area(SPRITES[name])


@pytest.mark.slow
def test_knowledge_is_all_held_out_and_shares_no_picture_with_test():
    some = [scene("knowledge", index) for index in range(PER_SPLIT)]
    assert all(s.held_out for s in some) and {s.family for s in some} == set(HELD_OUT_FAMILIES)
    pairs = {frozenset(shown(s)) for s in some if s.family in ("two_object", "position")}
    assert pairs == STANDARD.held_out_pairs
    assert not {s.content() for s in some} & {s.content() for s in scenes.test_prompts(3 * PER_SPLIT)}


@pytest.mark.slow
def test_test_prompts_by_group():
    """Of the standard world: of the same families, half seen, half unseen."""
    found = scenes.groups(PER_SPLIT)
    assert found.keys() == {"seen", "unseen"} == set(STANDARD.group_names)
    assert all(s.held_out == (name == "unseen") for name, some in found.items() for s in some)
    families = [Counter(s.family for s in some) for some in found.values()]
    assert families == [dict.fromkeys(HELD_OUT_FAMILIES, PER_SPLIT // 12)] * 2
    assert [len(some) for some in scenes.groups(PER_SPLIT, LONG_TAIL).values()] == [PER_SPLIT // 3] * 3


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_prefix_is_balanced(world):
    """Family by family; of the long-tailed world's splits with groups also group by group."""
    for split, rules in world.splits.items():
        some = [scene(split, index, world) for index in range(60)]
        assert [s.family for s in some] == [rules.families[i % len(rules.families)] for i in range(60)]
        if world is LONG_TAIL and split in ("valid", "test"):
            for end in range(6, 61, 6):
                assert set(Counter(scenes.group(s, world) for s in some[:end]).values()) == {end // 3}


@pytest.mark.parametrize("split", ["valid", "test", "knowledge"])
def test_a_class_leads_equally_often_in_every_family(split):
    """In one period, as often as every other class of its group; groups lead equally often, too."""
    groups = [TAIL + ABSENT] if split == "knowledge" else [HEAD, TAIL, ABSENT]
    leads = LONG_TAIL.splits[split].leads
    counts = Counter((FAMILIES[index % 6], name) for index, name in enumerate(leads))
    share = len(leads) // len(groups) // 6
    expected = {(family, name): share // len(group) for family in FAMILIES for group in groups for name in group}
    assert counts == expected and sum(expected.values()) == len(leads)


def test_splits_share_no_picture(drawn):
    contents = [{s.content() for s in some} for some in drawn.values()]
    assert all(not a & b for a, b in itertools.combinations(contents, 2))
    for a, b in itertools.combinations(LONG_TAIL.splits.values(), 2):
        assert not set(a.buckets) & set(b.buckets)
    assert all(scenes._bucket(s) in LONG_TAIL.splits[split].buckets for split, some in drawn.items() for s in some)


def test_what_each_split_shows(drawn):
    for s in itertools.chain(drawn["valid"], drawn["test"]):
        assert len(shown(s) - set(HEAD)) == (scenes.group(s, LONG_TAIL) != "head")
    for s in drawn["knowledge"]:
        assert len(shown(s) - set(HEAD)) == 1
    assert set.union(*map(shown, drawn["sprites"])) == set(SPRITES)
    assert not any(s.held_out for some in drawn.values() for s in some)


@pytest.mark.slow
def test_a_scene_of_the_long_tail_says_how_rare_it_is(drawn):
    for s in drawn["test"]:
        rarest = scenes.rarest(s, LONG_TAIL)
        assert LONG_TAIL.train_scenes[rarest] == min(LONG_TAIL.train_scenes[name] for name in shown(s))
        assert rarest in LONG_TAIL.groups[scenes.group(s, LONG_TAIL)]


def test_the_fall_is_a_power_law():
    counts = list(LONG_TAIL.train_scenes.values())
    assert min(counts[:24]) > 3_000
    assert counts[24:52] == [round(30 * (25 / rank) ** 1.5) for rank in range(25, 53)]
    assert (counts[24], counts[51], set(counts[52:])) == (30, 10, {0})
    for rank, count in enumerate(counts[:24], 1):
        assert abs(count / counts[23] / math.sqrt(24 / rank) - 1) < 0.1


@pytest.mark.parametrize("split", ["train", "store"])
def test_leads_are_scattered_evenly_and_none_is_absent(split):
    """The tail's scenes follow from the leads alone, because all other classes come from the pool, the head."""
    rules = LONG_TAIL.splits[split]
    assert set(rules.pool) == set(HEAD) and len(rules.leads) == PERIOD
    assert Counter(filter(None, rules.leads)) == {name: LONG_TAIL.train_scenes[name] for name in TAIL}
    tenths = [sum(map(bool, rules.leads[start : start + PERIOD // 10])) for start in range(0, PERIOD, PERIOD // 10)]
    assert max(tenths) - min(tenths) <= 2


@pytest.mark.slow
def test_the_first_scenes_of_training_show_the_classes_that_lead_and_the_head():
    leads = LONG_TAIL.splits["train"].leads[:3000]
    for index, lead in enumerate(leads):
        assert shown(scene("train", index, LONG_TAIL)) - set(HEAD) == {lead} - {None}
    assert any(leads)


@pytest.mark.long
def test_training_shows_each_class_as_often_as_its_world_says():
    counts = Counter(name for index in range(PERIOD) for name in shown(scene("train", index, LONG_TAIL)))
    assert {name: counts[name] for name in SPRITES} == LONG_TAIL.train_scenes


@pytest.mark.slow
def test_the_store_has_no_more_of_the_tail_and_no_absent_class():
    leads = LONG_TAIL.splits["store"].leads
    for index in (i for i in range(PERIOD) if leads[i] is not None or i % 100 == 0):
        assert shown(scene("store", index, LONG_TAIL)) - set(HEAD) == {leads[index]} - {None}


@pytest.mark.slow
@pytest.mark.long
def test_true_scenes_of_the_long_tail_are_right():
    some, pictures = true_images("test", 300, LONG_TAIL)
    assert object_score(pictures, some, LONG_TAIL)["overall"] == 1
    found = [{(d.name, d.colour, d.box) for d in detections} for detections in detect(pictures, LONG_TAIL)]
    held = [{(sprite.name, sprite.colour, sprite.box) for sprite in s.sprites} for s in some]
    assert all(true <= seen for true, seen in zip(held, found, strict=True))
    blurred = np.stack([as_a_tokenizer_might(picture, seed) for seed, picture in enumerate(pictures)])
    assert object_score(blurred, some, LONG_TAIL)["overall"] >= 0.95


@pytest.mark.slow
def test_true_scenes_of_knowledge_are_right():
    for world in (STANDARD, LONG_TAIL):
        some, pictures = true_images("knowledge", 48, world)
        assert object_score(pictures, some, world)["overall"] == 1


@pytest.mark.slow
def test_a_sprite_of_another_world_is_not_looked_for():
    some, pictures = true_images("knowledge", 12, LONG_TAIL)
    assert all(d.name in STANDARD.classes for found in detect(pictures) for d in found)
    assert object_score(pictures, some)["overall"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world"), [("emoji_scenes/tiny", STANDARD), ("emoji_scenes/long_tail_tiny", LONG_TAIL)]
)
def test_the_benchmark_scores_groups(name, world):
    count = 36
    benchmark = open_benchmark("emoji_scenes", DataSetConfig(source=name))
    expected = [scenes.group(scene("test", i, world), world) for i in range(count)]
    assert benchmark.prompts(count) == [s.caption for s in scenes.test_prompts(count, world)]
    truth = benchmark.true_images(np.arange(count))
    wrong = np.array([group == world.group_names[-1] for group in expected])
    ground = np.full_like(truth, 150)  # an empty scene
    drawn = np.where(wrong[:, None, None, None], ground, truth)
    row = benchmark.score([[ImageBatch(np.arange(count), drawn)], [ImageBatch(np.arange(count), truth)]])
    assert row["groups"] == dict.fromkeys(world.group_names[:-1], 1.0) | {world.group_names[-1]: 0.5}
    others = (0.5, 1) if world is STANDARD else (None, 1 - wrong.mean() / 2)
    assert (row["held_out_pairs"], row["other_prompts"]) == others
    rare = [LONG_TAIL.train_scenes[scenes.rarest(s, world)] for s in scenes.test_prompts(count, world) if world.groups]
    for name, figure in row["training_scenes"].items():
        low, high = map(int, name.split(" to "))
        assert any(low <= number <= high for number in rare)
        assert figure["mean"] == (0.5 if high == 0 else 1.0)
    assert len(row["training_scenes"]) == len({np.searchsorted([0, 14, 19, 30], number) for number in rare})
    head, _, cells = benchmark.table({"plain": row}).split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]][-len(world.group_names) :] == list(world.group_names)
    assert [cell.strip() for cell in cells.split("|")[1:-1]][-1] == "0.500"


@pytest.mark.slow
def test_files_hold_the_group_and_the_number_of_training_scenes(tmp_path):
    for split in LONG_TAIL.splits:
        source = dataset.load_source("emoji_scenes/long_tail_tiny", split, tmp_path)
        for index in range(0, 64, 7):
            expected, got = scene(split, index, LONG_TAIL), source[index]
            assert (got["caption"].decode(), got["group"].decode()) == (
                expected.caption,
                scenes.group(expected, LONG_TAIL),
            )
            assert got["train_scenes"] == LONG_TAIL.train_scenes[scenes.rarest(expected, LONG_TAIL)]
            assert {tuple(SPRITES)[number] for number in got["classes"] if number >= 0} == shown(expected)
            assert (got["image"] == render(expected)).all()
    words = dataset.SceneSource("emoji_scenes/long_tail_tiny", tmp_path, (48, 48)).words
    assert words == scenes.words(LONG_TAIL)


def test_every_size_has_every_split_of_its_world():
    for config in dataset.EmojiScenes.BUILDER_CONFIGS:
        assert [split for split, _ in config.sizes] == list(config.world.splits)
    sizes = {config.name: dict(config.sizes) for config in dataset.EmojiScenes.BUILDER_CONFIGS}
    assert [sizes[name]["knowledge"] for name in ("full", "small", "tiny")] == [12_000, 2_000, 64]
    assert sizes["long_tail"]["train"] == sizes["long_tail"]["store"] == PERIOD
    assert len(TAIL + ABSENT) * 300 == sizes["long_tail"]["knowledge"]


@pytest.mark.slow
def test_files_of_an_earlier_version_are_made_anew(tmp_path, monkeypatch):
    """They lie beside the new ones, and stay as they are."""
    with monkeypatch.context() as patch:
        patch.setattr(dataset.EmojiScenes, "VERSION", "1.1.0")
        (tiny,) = (c for c in dataset.EmojiScenes.BUILDER_CONFIGS if c.name == "tiny")
        patch.setattr(tiny, "sizes", tiny.sizes[:4])
        old = dataset.load_source("emoji_scenes/tiny", "test", tmp_path, images=False)
        old = [old[index] for index in range(64)]
    assert len(dataset.load_source("emoji_scenes/tiny", "knowledge", tmp_path)) == 64
    new = dataset.load_source("emoji_scenes/tiny", "test", tmp_path, images=False)
    assert [new[index]["image"] for index in range(64)] == [each["image"] for each in old]
    assert sorted(path.name for path in (tmp_path / "emoji_scenes" / "tiny").iterdir()) == ["1.1.0", "1.2.0"]


def matches(size: int, ground: str) -> np.ndarray:
    """The detector's score (without its floor) of every look's template in the place of every look, by class."""
    looks = [(name, colour) for name, entry in SPRITES.items() for colour in (None, *entry.tints)]
    box = (0, 0, size, size)
    scene_of = lambda look: Scene("", "colors", ground, (scenes.Sprite(*look, box),), None, False)  # noqa: E731
    patches = np.stack([render(scene_of(look))[:size, :size] for look in looks]).astype(float)  # [looks s s 3]
    owner = np.array([tuple(SPRITES).index(name) for name, _ in looks])
    best = np.zeros((len(SPRITES), len(SPRITES)))
    for number, look in enumerate(looks):
        sprite = scenes.sprite_rgba(*look, size).astype(float)
        alpha = sprite[..., 3:] / 255
        under = ((1 - alpha) * patches).sum((1, 2)) / (1 - alpha).sum()  # [looks 3]
        seen, template = patches - under[:, None, None], alpha * (sprite[..., :3] - under[:, None, None])
        norms = np.sqrt((seen**2).sum((1, 2, 3)) * (template**2).sum((1, 2, 3)))
        np.maximum.at(best[owner[number]], owner, (seen * template).sum((1, 2, 3)) / norms)
    return best


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ground"), [(16, "sand"), (20, "slate")])
def test_a_new_class_looks_like_no_other(size, ground):
    """The likest pairs of the first sixteen classes, a cat and a pig for example, match each other better."""
    best = matches(size, ground)
    assert best.diagonal().min() > 0.97  # soft edges tint what is taken for the ground
    others = best - np.eye(len(best))
    assert others[16:].max() < 0.8 and others[:, 16:].max() < 0.8 < others[:16, :16].max()
