"""Laws of the object score: true scenes are right, also blurred; other scenes and empty grounds are wrong."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from arrag_jax.data.emoji.scenes import GROUNDS, SIDE, Scene, Sprite, render, scene, sprite_rgba, test_prompts
from arrag_jax.data.emoji.worlds import STANDARD
from arrag_jax.errors import UserError
from arrag_jax.evaluation.emoji.detector import detect
from arrag_jax.evaluation.emoji.object_score import object_score

PROMPTS = test_prompts(72)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([render(s) for s in PROMPTS])


def as_a_tokenizer_might(picture: np.ndarray, seed: int) -> np.ndarray:
    """Mild blur and noise: down to three quarters and up again, sigma 6."""
    small = Image.fromarray(picture).resize((SIDE * 3 // 4,) * 2, Image.Resampling.BILINEAR)
    blurred = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), float)
    return np.clip(blurred + np.random.default_rng(seed).normal(0, 6, blurred.shape), 0, 255).astype(np.uint8)


def scene_of(caption_family: str, *sprites: Sprite, relation: str | None = None) -> Scene:
    return Scene("", caption_family, "sand", sprites, relation, False)


@pytest.mark.slow
def test_true_scenes_are_right_and_every_sprite_is_found_in_its_place(pictures):
    score = object_score(pictures, PROMPTS)
    assert score["overall"] >= 0.98
    found = [{(d.name, d.colour, d.box) for d in detections} for detections in detect(pictures)]
    held = [{(sprite.name, sprite.colour, sprite.box) for sprite in s.sprites} for s in PROMPTS]
    assert all(true <= seen for true, seen in zip(held, found, strict=True))
    assert np.mean([true == seen for true, seen in zip(held, found, strict=True)]) >= 0.95


@pytest.mark.slow
def test_blurred_and_noisy_scenes_are_right(pictures):
    blurred = np.stack([as_a_tokenizer_might(picture, seed) for seed, picture in enumerate(pictures)])
    assert object_score(blurred, PROMPTS)["overall"] >= 0.95


@pytest.mark.slow
def test_scenes_are_wrong_for_the_prompts_of_others(pictures):
    pairs = [
        (i, j)
        for i, a in enumerate(PROMPTS)
        for j, b in enumerate(PROMPTS)
        if a.family == b.family and {s.name for s in a.sprites} != {s.name for s in b.sprites}
    ]
    found = object_score(pictures[[i for i, _ in pairs[::7]]], [PROMPTS[j] for _, j in pairs[::7]])
    assert len(found["families"]) == 6 and found["overall"] <= 0.05


@pytest.mark.slow
def test_nothing_is_found_on_empty_grounds():
    grounds = np.stack([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in GROUNDS.values()])
    noise = np.random.default_rng(0).integers(0, 256, grounds.shape).astype(np.uint8)
    assert detect(grounds) == detect(noise) == [[]] * len(grounds)
    assert object_score(grounds, PROMPTS[:6])["overall"] == 0


def test_the_score_is_the_correlation_of_what_stands_out_from_the_ground(pictures):
    """Against the formula written out pixel by pixel in float64, on a picture that is not a clean scene."""
    blurred = as_a_tokenizer_might(pictures[5], seed=1)
    (detections,) = detect(blurred[None])
    assert detections
    for name, colour, (x0, y0, x1, y1), score in detections:
        sprite = sprite_rgba(name, colour, x1 - x0).astype(float)
        alpha, patch = sprite[..., 3:] / 255, blurred[y0:y1, x0:x1].astype(float)
        ground = ((1 - alpha) * patch).sum((0, 1)) / (1 - alpha).sum()
        seen, template = patch - ground, alpha * (sprite[..., :3] - ground)
        floor = seen.size * 4.0**2
        expected = (seen * template).sum() / np.sqrt(((seen**2).sum() + floor) * (template**2).sum())
        np.testing.assert_allclose(score, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_picture_is_judged_alone(pictures):
    """Also across the edge of a batch: detections don't depend on the pictures beside."""
    together, alone = detect(pictures[:19]), [detect(picture[None])[0] for picture in pictures[14:19]]
    strip = [[[d[:3] for d in found] for found in some] for some in (together[14:], alone)]
    assert strip[0] == strip[1]


@pytest.mark.slow
def test_only_counting_minds_extra_sprites():
    cats = [Sprite("cat", None, (x, y, x + 16, y + 16)) for x, y in ((0, 0), (28, 0), (0, 28))]
    picture = render(scene_of("counting", *cats))[None]
    assert [object_score(picture, [scene_of("counting", *cats[:1] * n)])["overall"] for n in (2, 3, 4)] == [0, 1, 0]
    assert object_score(picture, [scene_of("single_object", cats[0])])["overall"] == 1


@pytest.mark.slow
def test_a_colour_counts_where_it_is_named():
    red = Sprite("cat", "red", (8, 8, 28, 28))
    picture = render(scene_of("colors", red))[None]
    for colour, family, right in (("red", "colors", 1), ("blue", "colors", 0), (None, "single_object", 1)):
        asked = scene_of(family, dataclasses.replace(red, colour=colour))
        assert object_score(picture, [asked])["overall"] == right


def test_colours_are_bound_to_their_class():
    scenes = [s for s in PROMPTS if s.family == "color_attribution"]
    swapped = []
    for s in scenes:
        a, b = s.sprites
        sprites = (dataclasses.replace(a, colour=b.colour), dataclasses.replace(b, colour=a.colour))
        swapped.append(dataclasses.replace(s, sprites=sprites))
    assert object_score(np.stack([render(s) for s in scenes]), swapped)["overall"] == 0


def test_a_relation_does_not_hold_the_other_way_round():
    scenes = [s for s in PROMPTS if s.family == "position"]
    turned = [dataclasses.replace(s, sprites=s.sprites[::-1]) for s in scenes]
    assert object_score(np.stack([render(s) for s in scenes]), turned)["overall"] == 0


def test_overall_is_the_mean_of_the_families_not_of_the_pictures():
    right, wrong = scene("test", 0), scene("test", 1)
    pictures = np.stack([render(right), render(right), np.full((SIDE, SIDE, 3), 150, np.uint8)])
    score = object_score(pictures, [right, right, wrong])
    assert score["right"].tolist() == [True, True, False]
    assert score["families"] == {"single_object": 1, "two_object": 0} and score["overall"] == 0.5


@pytest.mark.slow
def test_every_split_is_scored_alike():
    for split in STANDARD.splits:
        some = [scene(split, index) for index in range(6)]
        assert object_score(np.stack([render(s) for s in some]), some)["overall"] == 1


def test_one_scene_a_picture(pictures):
    with pytest.raises(UserError, match="72 images for 3 scenes"):
        object_score(pictures, PROMPTS[:3])
    with pytest.raises(UserError, match="0 images"):
        object_score(pictures[:0], [])
