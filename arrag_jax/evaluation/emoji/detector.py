"""Finds the sprites of ``emoji_scenes`` in an image by template matching; nothing is trained.

Every sprite (class x tint x size) is compared with the image at every place. The match is a normalised correlation
in RGB of the differences from the background colour. The background colour g is the mean of the image under the
transparent part of the sprite, with weights 1 - a, where a is the alpha. P are the image's pixels in the box, C the
sprite's:

    score = <P - g, a (C - g)> / (|P - g| |a (C - g)|).

The score is 1 for a rendered sprite and 0 for a plain background. (If the mean were subtracted instead, as is usual, a
pale red background would match a red heart.) All sums over pixels are linear in P or in its square, so each size is one
matrix product.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrag_jax.data.emoji import scenes
from arrag_jax.data.emoji.worlds import STANDARD, World

THRESHOLD = 0.65  # true sprites score at least 0.84 even if blurred; chance matches seldom reach 0.65
_MAX_DETECTIONS = 8  # per image
_MAX_OVERLAP = 0.1  # of the boxes of two detections, as a share of the smaller box
_NOISE = 4.0  # grey levels; a lower contrast does not count as a sprite
_BATCH = 16  # images that are matched at once; their patches take about 100 MB, the scores of 316 looks about 40 MB


class Detection(NamedTuple):
    """A detected sprite: class name, tint (None: natural colours), box in pixels, score up to 1."""

    name: str
    colour: str | None
    box: scenes.Box
    score: float


Numbers = np.ndarray | Array


class _Bank(NamedTuple):
    """All sprites of one size s as kernels, n = 3 s s.

    Looks are (class, tint) pairs; masks are the alphas of the classes.
    """

    colours: Float[Numbers, "n looks"]  # a C
    alphas: Float[Numbers, "n masks_channels"]  # a, once per channel
    mask_of_look: Int[Numbers, " looks"]
    alpha_sum: Float[Numbers, "1 masks"]  # sums of a and of a² over the s s pixels
    alpha_square_sum: Float[Numbers, "1 masks"]
    colour_sum: Float[Numbers, "masks_channels looks"]  # sums of a C and of a² C, zero outside the look's own mask
    colour_square_sum: Float[Numbers, "masks_channels looks"]
    energy: Float[Numbers, "1 looks"]  # sum of a² C²


class _Templates(NamedTuple):
    """The constants of the matching: a bank for each size, and which pairs of places overlap too much."""

    banks: tuple[_Bank, ...]
    clash: Bool[Array, "places places"]


def detect(pictures: UInt8[np.ndarray, "B 48 48 3"], world: World = STANDARD) -> list[list[Detection]]:
    """Returns the sprites in each image, best first: at most eight, and no two overlap by more than a tenth.

    Only sprites of the world's classes are looked for.
    """
    looks, boxes, found = _looks(world), _boxes(), []
    for start in range(0, len(pictures), _BATCH):
        batch = pictures[start : start + _BATCH]
        padded = np.zeros((_BATCH, *pictures.shape[1:]), np.uint8)  # padding, so that only one shape is compiled
        padded[: len(batch)] = batch
        with jax.default_matmul_precision("highest"):  # by default, accelerators round products to 8-10 bits
            peaks = _match(padded, _templates(world))
        rows = zip(*(np.asarray(part) for part in peaks), strict=True)
        for score, look, place in itertools.islice(rows, len(batch)):
            kept = np.flatnonzero(score > THRESHOLD)
            found.append([Detection(*(*looks[look[i]], boxes[place[i]], float(score[i]))) for i in kept])
    return found


@jax.jit
def _match(
    pictures: UInt8[np.ndarray | Array, "B 48 48 3"], templates: _Templates
) -> tuple[Float[Array, "B peaks"], Int[Array, "B peaks"], Int[Array, "B peaks"]]:
    """Returns score, look and place of each image's best peaks; a place is a row of ``_boxes``."""
    scores = [
        _scores(jnp.asarray(pictures).astype(jnp.float32), bank, size)
        for bank, size in zip(templates.banks, scenes.SIZES, strict=True)
    ]
    places = jnp.concatenate(scores, axis=1)  # [B places looks]
    best, look = places.max(-1), places.argmax(-1)

    def take_peak(left, _):
        place = left.argmax(-1)
        score = jnp.take_along_axis(left, place[:, None], 1)[:, 0]
        return jnp.where(templates.clash[place], -1.0, left), (score, place)

    _, (score, place) = jax.lax.scan(take_peak, best, None, length=_MAX_DETECTIONS)
    return score.T, jnp.take_along_axis(look, place.T, 1), place.T


def _scores(pictures: Float[Array, "B 48 48 3"], bank: _Bank, size: int) -> Float[Array, "B places looks"]:
    """Returns the match of every sprite of a size at every place, in raster order."""
    steps = scenes.SIDE - size + 1
    rows = jnp.stack([pictures[:, y : y + steps] for y in range(size)], -2)
    patches = jnp.stack([rows[:, :, x : x + steps] for x in range(size)], -2)
    patches = patches.reshape(-1, 3 * size**2)  # [P n], P = B places
    square_sum = (patches**2).sum(-1, keepdims=True)
    total = patches.reshape(-1, size**2, 3).sum(1, keepdims=True)  # [P 1 3]
    products = patches @ jnp.concatenate([bank.colours, bank.alphas], 1)
    looks = bank.colours.shape[1]
    covered = products[:, looks:].reshape(len(patches), -1, 3)  # sum of a P, [P masks 3]

    ground = (total - covered) / (size**2 - bank.alpha_sum)[..., None]  # [P masks 3]
    ground_square = (ground**2).sum(-1)
    contrast = square_sum - 2 * (ground * total).sum(-1) + size**2 * ground_square  # |P - g|², [P masks]
    under = (ground * covered).sum(-1) - ground_square * bank.alpha_sum  # <P - g, a g>, [P masks]

    flat_ground = ground.reshape(len(patches), -1)
    match = products[:, :looks] - flat_ground @ bank.colour_sum - under[:, bank.mask_of_look]
    expected = (  # |a (C - g)|²
        bank.energy
        - 2 * flat_ground @ bank.colour_square_sum
        + (ground_square * bank.alpha_square_sum)[:, bank.mask_of_look]
    )
    floor = 3 * size**2 * _NOISE**2
    scores = match / jnp.sqrt((contrast[:, bank.mask_of_look] + floor) * jnp.maximum(expected, floor))
    return scores.reshape(len(pictures), steps**2, looks)


def _looks(world: World) -> list[tuple[str, str | None]]:
    return [(entry.name, colour) for entry in world.classes.values() for colour in (None, *entry.tints)]


def _boxes() -> list[scenes.Box]:
    """Returns every place of every size, in the order of the matches."""

    def of_size(size: int) -> Iterator[scenes.Box]:
        corners = range(scenes.SIDE - size + 1)
        return ((x, y, x + size, y + size) for y in corners for x in corners)

    return [box for size in scenes.SIZES for box in of_size(size)]


@functools.cache
def _templates(world: World) -> _Templates:
    boxes = np.array(_boxes())
    corner, end = boxes[:, :2], boxes[:, 2:]
    shared = np.minimum(end[:, None], end) - np.maximum(corner[:, None], corner)
    area = (end - corner).prod(-1)
    overlap = np.maximum(shared, 0).prod(-1) / np.minimum(area[:, None], area)
    return _Templates(tuple(_bank(world, size) for size in scenes.SIZES), jnp.asarray(overlap > _MAX_OVERLAP))


def _bank(world: World, size: int) -> _Bank:
    names, looks = list(world.classes), _looks(world)
    pixels = np.stack([scenes.sprite_rgba(name, colour, size) for name, colour in looks]).astype(np.float64)
    colour, alpha = pixels[..., :3], pixels[..., 3:] / 255
    masks = np.stack([scenes.sprite_rgba(name, None, size)[..., 3] for name in names]) / 255.0
    mask_of_look = np.array([names.index(name) for name, _ in looks])
    own_mask = mask_of_look == np.arange(len(names))[:, None]  # [masks looks]
    per_channel = masks[..., None, None] * np.eye(3)  # [masks s s channel-of-pixel channel-summed]
    bank = _Bank(
        colours=(alpha * colour).reshape(len(pixels), -1).T,
        alphas=np.moveaxis(per_channel, 0, 3).reshape(3 * size**2, -1),
        mask_of_look=mask_of_look,
        alpha_sum=masks.sum((1, 2))[None],
        alpha_square_sum=(masks**2).sum((1, 2))[None],
        colour_sum=np.einsum("ml,lc->mcl", own_mask, (alpha * colour).sum((1, 2))).reshape(-1, len(pixels)),
        colour_square_sum=np.einsum("ml,lc->mcl", own_mask, (alpha**2 * colour).sum((1, 2))).reshape(-1, len(pixels)),
        energy=((alpha * colour) ** 2).sum((1, 2, 3))[None],
    )
    return jax.tree.map(lambda part: jnp.asarray(part, jnp.int32 if part.dtype == int else jnp.float32), bank)
