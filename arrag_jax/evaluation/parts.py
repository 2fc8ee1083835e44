"""Parts of pictures: which positions of a given image stay, which are drawn, and how both become one picture.

Positions are drawn where a mask is white, beside the image (extension), or where the model is least sure of the image
(variations). All others keep the image's codes. An extended picture is larger than the model's grid. It is drawn in
windows of the model's own grid, each of which keeps half of the one before it. So the model never sees a position that
it was not trained for, whatever kind of positions it has, and no size is beyond it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from arrag_jax.config import SamplingConfig
from arrag_jax.data.pixels import decode, fitted
from arrag_jax.decode.stream import BLANK
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Batch, Pipeline
from arrag_jax.files import sha256_of
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.ops.grid import MOST_SIDE

SIDES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
LEAST_SHARE = 0.5  # of an image that must be left when it is cropped to the shape of the model's grid
WINDOW_SEEDS = 7919  # distance between the seeds of two windows, which must not draw with the same noise


@dataclasses.dataclass(frozen=True)
class PartOf:
    """What is to be drawn of an image, as flags say it; checked without a model.

    Attributes:
      image: path of the image.
      mask: path of an image of the same size, white where the image is to be drawn.
      extend: "SIDE:PIXELS", by which the picture grows.
      strength: share of the positions that are drawn, those that the model is least sure of; 0 = not asked for.

    Raises:
      UserError: if not exactly one of mask, extend and strength is given, or one of them is not valid.
    """

    image: str
    mask: str = ""
    extend: str = ""
    strength: float = 0.0

    def __post_init__(self):
        ways = "--mask FILE, --extend SIDE:PIXELS or --strength SHARE"
        number = bool(self.mask) + bool(self.extend) + (self.strength != 0)
        if not self.image:
            raise UserError(f"{ways} say what is drawn of an image; give it: --image FILE")
        if number != 1:
            raise UserError(f"--image needs one of {ways}; {number} are given")
        if not 0 <= self.strength <= 1:
            raise UserError(f"--strength={self.strength:g} is outside (0, 1]")
        _ = self.side

    def require(self, sampling: SamplingConfig) -> None:
        """Raises UserError unless a part can be drawn with these settings."""
        require_whole_runs(self.side, sampling)

    @property
    def side(self) -> tuple[str, int] | None:
        """The side that is extended, and by how many pixels; None = nothing is extended."""
        if not self.extend:
            return None
        side, _, pixels = self.extend.partition(":")
        if side not in SIDES or not pixels.isdecimal() or int(pixels) < 1:
            raise UserError(f"--extend={self.extend} must be a side ({', '.join(SIDES)}) and pixels: right:128")
        return side, int(pixels)


def require_whole_runs(side: tuple[str, int] | None, sampling: SamplingConfig) -> None:
    """Raises UserError if a picture that grows is to be guarded: a window does not see all of a run that joins two."""
    if side is not None and sampling.max_copied_cells is not None:
        raise UserError(
            "a picture that grows is drawn in windows, which see only parts of its runs, so max_copied_cells cannot "
            "guard it; leave it out"
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """An image of which a part is drawn.

    Attributes:
      pixels: the image at the size of the result; grey where there is none.
      kept: pixels of the result that stay those of the image; the others are decoded from codes.
      codes: its codes; -1 where a code is drawn.
      strength: as in ``PartOf``; the positions then follow from prompt and model.
      facts: what the files of the result tell of it.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    kept: Bool[np.ndarray, "h w"]
    codes: Int[np.ndarray, "H W"]
    strength: float
    facts: dict[str, str]

    @property
    def shown(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image with grey pixels where it is drawn; whole if that is not known yet."""
        if self.strength:
            return self.pixels
        return np.where(self.kept[..., None], self.pixels, np.uint8(BLANK))

    def windows(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Returns row and column of the windows that are drawn one after another; each has the size of the grid."""
        down, right = self.codes.shape[0] - grid[0], self.codes.shape[1] - grid[1]
        if not (more := down + right):
            return [(0, 0)]
        step = max(1, grid[0 if down else 1] // 2)
        moved = [min(step * number, more) for number in range(1, -(-more // step) + 1)]
        if self.codes[0, 0] < 0:  # the image lies at the end
            moved = [more - each for each in moved]
        return [(each, 0) if down else (0, each) for each in moved]


def open_part(wanted: PartOf, model: ImageTokenizer) -> Part:
    """Reads the files, and returns the image with what of it is to be drawn.

    Raises:
      UserError: if a file cannot be read, the mask has another size than the image or leaves nothing to keep or to
        draw, less than half of the image fits the model's grid, or as ``part_of``.
    """
    size, own = model.image_size, _decoded(wanted.image, None).shape[:2]
    ratio = own[0] * size[1] / (own[1] * size[0])
    if (share := min(ratio, 1 / ratio)) < LEAST_SHARE:
        raise UserError(
            f"{wanted.image} is {own[1]} x {own[0]} pixels; {share:.0%} of it would be left in the model's "
            f"{size[1]} x {size[0]}; crop it first"
        )
    facts = {"image": Path(wanted.image).name, "image_sha256": sha256_of(Path(wanted.image))}
    mask, by = None, ""
    if wanted.mask:
        white = _decoded(wanted.mask, None).mean(2) >= 128
        if white.shape != own:
            asked, given = (f"{shape[1]} x {shape[0]}" for shape in (own, white.shape))
            raise UserError(f"{wanted.mask} is {given} pixels, {wanted.image} {asked}; a mask has its image's size")
        if white.all() or not white.any():
            colour, mend = (
                ("white", "kept; make black what is") if white.all() else ("black", "drawn; make white what is")
            )
            raise UserError(f"{wanted.mask} is {colour} all over, so nothing is {mend}")
        mask, by = fitted_mask(white, size), f"the mask {Path(wanted.mask).name}"
        facts["mask_sha256"] = sha256_of(Path(wanted.mask))
    return part_of(model, _decoded(wanted.image, size), mask, wanted.side, wanted.strength, facts, by)


def part_of(
    model: ImageTokenizer,
    pixels: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"] | None = None,
    side: tuple[str, int] | None = None,
    strength: float = 0.0,
    facts: dict[str, str] | None = None,
    by: str = "a mask",
) -> Part:
    """Returns an image of the model's size with what of it is to be drawn.

    Args:
      mask: True where the image is drawn. A position is drawn if any of its pixels is.
      side: a side that grows, and by how many pixels of the model's size.
      strength: as in ``PartOf``.
      facts: what is known of the image's file.
      by: what the mask is called in the facts.

    Raises:
      UserError: if the mask leaves nothing to keep or to draw, or a side grows by a part of a position or beyond the
        largest grid.
    """
    codes = np.asarray(model.encode_images(from_uint8(pixels)[None])[0]).reshape(model.grid)
    kept, (height, width) = np.zeros(pixels.shape[:2], bool), model.grid
    tall, wide = pixels.shape[0] // height, pixels.shape[1] // width
    told = "none, all are decoded from codes"
    if mask is not None:
        drawn = mask.reshape(height, tall, width, wide).any((1, 3))
        if drawn.all() or not drawn.any():
            which, mend = ("every", "kept") if drawn.all() else ("no", "drawn")
            raise UserError(f"{by} is white in {which} position of the {height} x {width} grid, so nothing is {mend}")
        codes, kept = np.where(drawn, -1, codes), ~mask
        what, told = f"{drawn.sum()} of {drawn.size} positions, by {by}", "those outside of the mask, as in the image"
    elif side is not None:
        pixels, kept, codes = _extended(pixels, codes, *side, (tall, wide))
        what, told = f"{side[1]} pixels {side[0]} of the image", "the image's own"
    else:
        what = f"{strength:.0%} of the positions, those that the model is least sure of"
    return Part(pixels, kept, codes, strength, {**(facts or {}), "drawn": what, "kept_pixels": told})


def _extended(
    pixels: np.ndarray, codes: np.ndarray, side: str, more: int, cell: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns pixels, which of them are the image's, and codes of an image that has grown at a side."""
    axis, each = (1, cell[1]) if SIDES[side][1] else (0, cell[0])
    if more % each:
        low = more // each * each
        mend = " or ".join(f"{side}:{x}" for x in (low, low + each) if x)
        raise UserError(f"--extend={side}:{more} is no whole number of positions, {each} pixels each; give {mend}")
    if (total := codes.shape[axis] + more // each) > MOST_SIDE:
        most = (MOST_SIDE - codes.shape[axis]) * each
        raise UserError(f"--extend={side}:{more} makes {total:,} positions in a row; at most {side}:{most}")
    before = sum(SIDES[side]) < 0

    def grown(array: np.ndarray, by: int, value: Any) -> np.ndarray:
        pads = [(0, 0)] * array.ndim
        pads[axis] = (by, 0) if before else (0, by)
        return np.pad(array, pads, constant_values=value)

    kept = grown(np.ones(pixels.shape[:2], bool), more, False)
    return grown(pixels, more, BLANK), kept, grown(codes, more // each, -1)


def fitted_mask(mask: Bool[np.ndarray, "h0 w0"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Returns a mask at h x w = ``size``, scaled and cropped as its image is; a pixel with any white is white."""
    whole = Image.fromarray(mask.astype(np.float32))
    return np.asarray(fitted(whole, size, Image.Resampling.BOX)) > 0


def draw(
    pipeline: Pipeline,
    part: Part,
    prompts: Sequence[str],
    method: str,
    seeds: Int[np.ndarray, " N"],
    wanted: Bool[np.ndarray, " N"] | None = None,
) -> Iterator[Batch]:
    """Yields drawn parts joined with what was kept, as ``Pipeline.draw`` yields images.

    The codes of an extended picture's batch are those of its last window.
    """
    passes = len(part.windows(pipeline.model.grid))
    for numbers, length, count in pipeline.each_batch(prompts, method, wanted, passes):
        yield _drawn(pipeline, part, prompts, method, seeds, numbers, length, count)


def _drawn(pipeline, part, prompts, method, seeds, numbers, length, count) -> Batch:
    """Returns the batch of some prompts."""
    height, width = pipeline.model.grid
    canvas, windows = np.tile(part.codes, (len(numbers), 1, 1)), part.windows((height, width))
    if part.strength:
        own = [prompts[int(i)] for i in numbers]
        canvas = np.where(least_sure(pipeline, method, own, part.codes, part.strength, length), -1, canvas)
    batch: Any = None
    for turn, (top, left) in enumerate(windows):
        here = np.s_[:, top : top + height, left : left + width]
        known = np.full((len(prompts), height * width), -1)
        known[numbers] = canvas[here].reshape(len(numbers), -1)
        own_seeds = (np.asarray(seeds) + turn * WINDOW_SEEDS) % 2**32
        batch = pipeline.draw_batch(prompts, method, own_seeds, numbers, length, count, known)
        canvas[here] = np.asarray(batch.drawn.codes).reshape(-1, height, width)
    images = batch.images
    if part.codes.shape != (height, width):
        flat = canvas.reshape(len(canvas), 1, -1)
        images = np.concatenate([to_uint8(pipeline.model.decode_codes(own, *part.codes.shape)) for own in flat])
    return batch._replace(images=np.where(part.kept[None, ..., None], part.pixels, images))


def least_sure(
    pipeline: Pipeline,
    method: str,
    prompts: Sequence[str],
    codes: Int[np.ndarray, "H W"],
    share: float,
    length: int | None = None,
) -> Bool[np.ndarray, "n H W"]:
    """Returns the share of an image's positions whose codes the method's model finds least probable, for each prompt.

    One teacher-forced pass gives the probabilities, without guidance. Of equal ones the later positions are chosen.
    """
    model: Any = pipeline.model_of(method)
    condition = model.check_condition(pipeline.text(prompts, length))
    flat = jnp.tile(jnp.asarray(codes, jnp.int32).reshape(1, -1), (len(prompts), 1))
    log_p = np.asarray(_log_p(*nnx.split(model), condition, flat))[:, ::-1]
    number = max(1, round(share * codes.size))
    chosen, order = np.zeros(log_p.shape, bool), np.argsort(log_p, axis=1, kind="stable")
    np.put_along_axis(chosen, order[:, :number], True, axis=1)
    return chosen[:, ::-1].reshape(-1, *codes.shape)


@jax.jit(static_argnums=0)
def _log_p(graph, state, condition, codes):
    """Returns the log-probability of each code after those before it."""
    log_p = jax.nn.log_softmax(nnx.merge(graph, state).teacher_forced(condition, codes))
    return jnp.take_along_axis(log_p, codes[..., None], 2)[..., 0]


def _decoded(path: str, size: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return decode(Path(path).read_bytes(), size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
