"""The worlds of ``emoji_scenes``: which classes exist, which scenes the splits hold, and what training never shows.

``scenes.scene`` samples every world by the same rules. The *standard* world has sixteen classes, all of them frequent;
some class pairs and some colour-class pairs are held out. The *long-tailed* world ranks 64 classes by how many training
scenes show them:

- head, ranks 1 to 24: drawn with a weight of 1/√rank, so that rank 24 still has thousands of scenes;
- tail, ranks 25 to 52: 30 (25/rank)^1.5 scenes among the ``PERIOD`` scenes of the split, which falls from 30 to 10;
- absent, ranks 53 to 64: none.

A scene that shows a class of the tail or an absent one shows only it and, in families of two classes, one of the head.
"""

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from arrag_jax.data.emoji.classes import SPRITES, SpriteClass

FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
HELD_OUT_FAMILIES = ("two_object", "colors", "position", "color_attribution")  # those that can use a held-out pair
PERIOD = 100_000  # scenes of train or store in the long-tailed world, after which the classes of the tail come again


class Split(NamedTuple):
    """The rules for the scenes of a split. The patterns are cycled through, so that every prefix is balanced."""

    buckets: Collection[int]  # values of the content hash, out of 16, that its images may have
    pool: tuple[str, ...]  # classes that are drawn, each as often as its weight
    leads: tuple[str | None, ...] = (None,)  # by index: a class that the scene must show; None = all are drawn
    families: tuple[str, ...] = FAMILIES  # by index
    held_out: tuple[bool, ...] = (False,)  # by turn through the families: whether a scene uses a held-out pair


@dataclass(frozen=True, eq=False)
class World:
    """The classes and splits of a data set. Worlds are compared by identity, so a world can be a key of caches.

    Attributes:
      prefix: text in the seed of every scene, so that worlds do not repeat one another.
      held_out_pairs, held_out_colours: unordered class pairs, and (colour, class) pairs. Scenes show one of them if
        their split asks for it, and else none.
      groups: the classes of each group of a long-tailed world.
      train_scenes: how many scenes of the split "train" show a class, in a world that has groups.
    """

    prefix: str
    classes: Mapping[str, SpriteClass]
    splits: Mapping[str, Split]
    held_out_pairs: frozenset[frozenset[str]] = frozenset()
    held_out_colours: frozenset[tuple[str, str]] = frozenset()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    train_scenes: Mapping[str, int] = field(default_factory=dict)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups that ``scenes.group`` tells apart."""
        return tuple(self.groups) or ("seen", "unseen")

    def group_of(self, name: str) -> str:
        """Returns the group of a class."""
        return next(group for group, names in self.groups.items() if name in names)


def _standard() -> World:
    """Returns the standard world. 16 of 120 class pairs are held out, every class in two, and 10 of 67 colours."""
    classes = dict(itertools.islice(SPRITES.items(), 16))
    names = tuple(classes)
    tints = [entry.tints for entry in classes.values()]
    return World(
        prefix="",
        classes=classes,
        splits={
            "train": Split(range(0, 5), names),
            "store": Split(range(5, 13), names),
            "valid": Split(range(13, 14), names),
            "test": Split(range(14, 16), names, held_out=(False, True)),
            # No scene of train, store and valid uses a held-out pair, so their buckets are free for this split.
            "knowledge": Split(range(0, 14), names, families=HELD_OUT_FAMILIES, held_out=(True,)),
        },
        held_out_pairs=frozenset(frozenset((name, names[(i + 5) % 16])) for i, name in enumerate(names)),
        held_out_colours=frozenset((tints[i][i % len(tints[i])], name) for i, name in enumerate(names) if i % 3),
    )


def _long_tail() -> World:
    """Returns the long-tailed world."""
    names = tuple(SPRITES)
    head, tail, absent = names[:24], names[24:52], names[52:]
    weighted = tuple(name for rank, name in enumerate(head, 1) for _ in range(round(240 / math.sqrt(rank))))
    few = {name: round(30 * (25 / rank) ** 1.5) for rank, name in enumerate(tail, 25)}
    leads = _scattered(few, PERIOD)
    return World(
        prefix="long_tail/",
        classes=SPRITES,
        splits={
            "train": Split(range(0, 5), weighted, leads),
            "store": Split(range(5, 9), weighted, leads),
            "valid": Split(range(14, 15), head, tuple(_in_turn(head, tail, absent))),
            "test": Split(range(15, 16), head, tuple(_in_turn(head, tail, absent))),
            "knowledge": Split(range(9, 12), head, tuple(_in_turn((*tail, *absent)))),
            "sprites": Split(range(12, 14), names),
        },
        groups={"head": head, "tail": tail, "absent": absent},
        train_scenes=dict(zip(head, HEAD_SCENES, strict=True)) | few | dict.fromkeys(absent, 0),
    )


def _in_turn(*groups: tuple[str, ...]) -> Iterator[str]:
    """Yields the leads of one period, in which every class of a group leads equally often in every family.

    Groups alternate, so that every turn through the families has equally many scenes of each of one, two or three
    groups.
    """
    for turn in range(len(groups) * math.lcm(*map(len, groups))):
        for place in range(len(FAMILIES)):
            group = groups[(turn + place) % len(groups)]
            yield group[(turn // len(groups) + 5 * place) % len(group)]


def _scattered(counts: Mapping[str, int], length: int) -> tuple[str | None, ...]:
    """Returns ``length`` leads, in which every class occurs as often as its count, at random but evenly spread."""
    names = [name for name, count in counts.items() for _ in range(count)]
    rng = random.Random("tail")  # Only ``random()`` is used, as in ``scenes.scene``.
    names.sort(key=lambda _: rng.random())
    leads: list[str | None] = [None] * length
    for number, name in enumerate(names):
        leads[int((number + rng.random()) * length / len(names))] = name
    return tuple(leads)


# How many of the first ``PERIOD`` scenes of train show each class of the head, by rank: counted, and checked by a test.
# fmt: off
HEAD_SCENES = (
    16928, 12277, 10132, 8966, 7803, 7155, 6677, 6291, 6072, 5733, 5348, 5164,
    5000, 4730, 4585, 4576, 4423, 4201, 4115, 4119, 3959, 3801, 3738, 3726,
)
# fmt: on

STANDARD, LONG_TAIL = _standard(), _long_tail()
