"""Laws of the emoji scenes: a picture shows what its caption says; splits are disjoint; files hold the scenes."""

import concurrent.futures
import errno
import functools
import hashlib
import io
import itertools
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from arrag_jax.data.emoji import dataset, scenes
from arrag_jax.data.emoji.classes import COLOURS, SPRITES
from arrag_jax.data.emoji.scenes import GROUNDS, SIDE, SIZES, STEP, render, scene
from arrag_jax.data.emoji.worlds import FAMILIES, HELD_OUT_FAMILIES, STANDARD
from arrag_jax.errors import UserError

PER_SPLIT = 300
CLASSES, SPLITS = STANDARD.classes, tuple(STANDARD.splits)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[scenes.Scene]]:
    return {split: [scene(split, index) for index in range(PER_SPLIT)] for split in SPLITS}


@pytest.fixture(scope="module")
def everything(drawn) -> list[scenes.Scene]:
    return list(itertools.chain(*drawn.values()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def read_caption(caption: str) -> tuple[list[tuple[str, str | None]], str | None]:
    """The sprites (class, colour) and the relation that a caption names, found by its words alone."""
    by_word = {entry.name: entry.name for entry in CLASSES.values()}
    by_word |= {entry.plural: entry.name for entry in CLASSES.values()}
    sprites, colour, count = [], None, 1
    for word in caption.split():
        if word in COLOURS:
            colour = word
        count = {"two": 2, "three": 3, "four": 4}.get(word, count)
        if word in by_word:
            sprites += [(by_word[word], colour)] * count
            colour = None
    return sprites, next((relation for relation in scenes.RELATIONS if f" {relation} " in caption), None)


def held_out_by_words(caption: str) -> bool:
    named, _ = read_caption(caption)
    classes = {name for name, _ in named}
    return classes in STANDARD.held_out_pairs or any(
        (colour, name) in STANDARD.held_out_colours for name, colour in named
    )


def test_a_scene_follows_from_split_and_index(drawn):
    for split, index in itertools.product(SPLITS, (7, 299, 5)):
        assert scene(split, index) == drawn[split][index]


@pytest.mark.slow
def test_scenes_never_change():
    """Prompts and stores made earlier stay valid: a change here calls for a new version of the builder."""
    first = SPLITS[:4]
    text = "\n".join(f"{s.caption}: {s.content()}" for split in first for s in map(scene, [split] * 30, range(30)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a1aedf3c6cf558a3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ("2ccb950a2e9cb547", "227c49c9d677cd1e")),
        ("store", ("b520d329c8d0f600", "ad7f471ae25852a7")),
        ("valid", ("07845e4e898d9ca2", "2c12ac50783a092c")),
        ("test", ("686e058162dc42db", "be6d1de9ab993333")),
    ],
)
def test_the_first_splits_are_those_of_version_1_1(drawn, split, expected):
    """Captions, contents and pixels of 50 scenes, recorded before there were other splits and another world."""
    some = drawn[split][:50]
    text = "\n".join(f"{s.caption}: {s.content()}" for s in some)
    pixels = b"".join(render(s).tobytes() for s in some)
    assert tuple(hashlib.sha256(x).hexdigest()[:16] for x in (text.encode(), pixels)) == expected


def test_captions_say_what_the_scene_holds(everything):
    for s in everything:
        assert read_caption(s.caption) == ([(sprite.name, sprite.colour) for sprite in s.sprites], s.relation)
        assert set(s.caption.split()) <= set(scenes.words())


def test_families_ask_what_they_are_named_for(everything):
    for s in everything:
        names = [sprite.name for sprite in s.sprites]
        coloured = [sprite.colour is not None for sprite in s.sprites]
        assert (len(names) > 1 and len(set(names)) == 1) == (s.family == "counting")
        assert (s.relation is not None) == (s.family == "position")
        assert all(coloured) if s.family in ("colors", "color_attribution") else not any(coloured)
        assert (len(names) == 1) == (s.family in ("single_object", "colors"))


def test_every_prefix_is_balanced(drawn):
    for split in SPLITS:
        families = HELD_OUT_FAMILIES if split == "knowledge" else FAMILIES
        assert [s.family for s in drawn[split]] == [families[i % len(families)] for i in range(PER_SPLIT)]


def test_sprites_lie_on_the_grid_and_do_not_overlap(everything):
    for s in everything:
        cover = np.zeros((SIDE, SIDE), int)
        for sprite in s.sprites:
            x0, y0, x1, y1 = sprite.box
            assert x1 - x0 == y1 - y0 and x1 - x0 in SIZES and x0 % STEP == y0 % STEP == 0
            assert min(sprite.box) >= 0 and max(sprite.box) <= SIDE
            cover[y0:y1, x0:x1] += 1
        assert cover.max() == 1


def test_relations_hold_by_a_clear_margin(everything):
    for s in (s for s in everything if s.relation):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (sprite.box for sprite in s.sprites)
        margin = {"left of": bx0 - ax1, "right of": ax0 - bx1, "above": by0 - ay1, "below": ay0 - by1}
        assert margin[s.relation] >= scenes.GAP
        across, along = sorted([abs(ax0 + ax1 - bx0 - bx1), abs(ay0 + ay1 - by0 - by1)])
        assert along > across


def test_relations_are_opposite_when_the_boxes_change_places(everything):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for s in everything:
        for a, b in itertools.combinations((sprite.box for sprite in s.sprites), 2):
            assert scenes.relations(b, a) == {opposite[relation] for relation in scenes.relations(a, b)}
    assert scenes.relations((0, 0, 16, 16), (3, 3, 19, 19)) == set()  # within a tenth of the summed sides
    assert scenes.relations((0, 0, 16, 16), (20, 20, 36, 36)) == {"left of", "above"}


def test_a_named_colour_is_never_a_natural_one(everything):
    for sprite in itertools.chain(*(s.sprites for s in everything)):
        assert sprite.colour not in CLASSES[sprite.name].natural


def test_splits_share_no_picture(drawn):
    contents = [{s.content() for s in drawn[split]} for split in SPLITS]
    pictures = [{render(s).tobytes() for s in drawn[split]} for split in SPLITS]
    for kind in (contents, pictures):
        assert all(not a & b for a, b in itertools.combinations(kind, 2))
    assert [len(a) for a in contents] == [len(a) for a in pictures]  # content tells pictures apart, and only pictures


@pytest.mark.slow
@pytest.mark.long
def test_splits_share_no_content_among_thousands():
    contents = [{scene(split, index).content() for index in range(1500)} for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(contents, 2))


def test_held_out_pairs_are_in_half_the_test_captions_and_in_all_of_knowledge_alone(drawn):
    for split in SPLITS:
        for s in drawn[split]:
            assert s.held_out == held_out_by_words(s.caption)
            assert split == "test" or s.held_out == (split == "knowledge")
    for family in FAMILIES:
        parts = [s.held_out for s in drawn["test"] if s.family == family]
        assert np.mean(parts) == (0 if family in ("single_object", "counting") else 0.5)


@pytest.mark.slow
def test_every_class_and_colour_is_met_in_training():
    """What is held out are pairs: each of their parts, and every other pair, may be learned."""
    sprites = {(sprite.name, sprite.colour) for index in range(1200) for sprite in scene("train", index).sprites}
    tinted = {(name, colour) for name, entry in CLASSES.items() for colour in (None, *entry.tints)}
    assert sprites == tinted - {(name, colour) for colour, name in STANDARD.held_out_colours}
    assert 0.1 < len(STANDARD.held_out_pairs) / 120 < 0.2
    assert 0.1 < len(STANDARD.held_out_colours) / (len(tinted) - len(CLASSES)) < 0.2


def test_the_ground_is_plain_where_no_sprite_is(drawn):
    for s in drawn["valid"][:200]:
        picture = render(s)
        free = np.ones((SIDE, SIDE), bool)
        for sprite in s.sprites:
            x0, y0, x1, y1 = sprite.box
            free[y0:y1, x0:x1] = False
            assert (picture[y0:y1, x0:x1] != GROUNDS[s.ground]).any(-1).mean() > 0.3
        assert (picture[free] == GROUNDS[s.ground]).all()


def test_tints_have_the_hue_of_their_name():
    for entry in CLASSES.values():
        for colour in entry.tints:
            pixels = scenes.sprite_rgba(entry.name, colour, 20).astype(float)
            mean = np.average(pixels[..., :3].reshape(-1, 3), axis=0, weights=pixels[..., 3].ravel())
            nearest = min(COLOURS, key=lambda name: np.linalg.norm(mean - COLOURS[name]))
            assert nearest == colour, entry.name


def test_the_first_prompts_are_the_test_split(drawn):
    assert scenes.test_prompts(30) == drawn["test"][:30]


@pytest.mark.slow
def test_files_give_back_the_scenes_in_order_to_the_bit(data_dir):
    names, tints = list(SPRITES), list(COLOURS)
    for split in SPLITS:
        source = dataset.load_source("emoji_scenes/tiny", split, data_dir)
        bare = dataset.load_source("emoji_scenes/tiny", split, data_dir, images=False)
        assert len(source) == len(bare) == 64
        for index in range(64):
            expected, got = scene(split, index), source[index]
            assert (got["index"], got["caption"].decode(), got["family"].decode()) == (
                index,
                expected.caption,
                expected.family,
            )
            assert (got["image"] == render(expected)).all()
            assert (np.array(Image.open(io.BytesIO(bare[index]["image"]))) == got["image"]).all()
            rows = zip(got["classes"], got["colours"], got["boxes"].tolist(), strict=True)
            sprites = [
                scenes.Sprite(names[name], tints[tint] if tint >= 0 else None, tuple(box))
                for name, tint, box in rows
                if name >= 0
            ]
            assert tuple(sprites) == expected.sprites
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_a_build_that_broke_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    def break_off(s, index):
        if index == 40:
            raise KeyboardInterrupt
        return whole(s, index)

    whole = dataset._example
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "_example", break_off)
        dataset.load_source("emoji_scenes/tiny", "train", tmp_path)
    source = dataset.load_source("emoji_scenes/tiny", "train", tmp_path, images=False)
    assert [source[i]["index"] for i in range(len(source))] == list(range(64))


@pytest.mark.slow
def test_of_several_that_find_it_absent_one_builds(tmp_path, monkeypatch):
    """Threads stand for processes: the lock belongs to an open folder, of which each has its own."""
    built, prepare = [], dataset.EmojiScenes.download_and_prepare

    def noted(builder):
        built.append(builder)
        prepare(builder)

    monkeypatch.setattr(dataset.EmojiScenes, "download_and_prepare", noted)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        load = functools.partial(dataset.load_source, "emoji_scenes/tiny", "valid", images=False)
        sources = list(pool.map(load, [tmp_path] * 3))
    assert len(built) == 1
    assert [[source[i]["index"] for i in range(len(source))] for source in sources] == [list(range(64))] * 3


def test_bad_names_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'emoji_scenes/huge'.*emoji_scenes/small"):
        dataset.load_source("emoji_scenes/huge", "train", tmp_path)
    with pytest.raises(UserError, match=r"'dev'.*valid"):
        dataset.load_source("emoji_scenes/tiny", "dev", tmp_path)
    with pytest.raises(UserError, match=r"'dev'.*valid"):
        scene("dev", 0)
    with pytest.raises(UserError, match="-1"):
        scene("train", -1)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["store[65:]", "store[:65]", "valid[x]"])
def test_a_slice_beyond_the_split_tells_what_it_holds(data_dir, split):
    with pytest.raises(UserError, match=rf"has no {re.escape(split)}: {split[:5]} holds 64 scenes"):
        dataset.load_source("emoji_scenes/tiny", split, data_dir)


def test_a_disk_that_is_full_while_the_data_set_is_built_is_named(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: the disk is full"):
        dataset.load_source("emoji_scenes/tiny", "valid", tmp_path)
