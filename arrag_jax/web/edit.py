"""What the studio's tab Edit does: fills what a visitor painted over, or draws beyond a side. It knows no page."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from arrag_jax.data.pixels import fitted
from arrag_jax.decode.methods import BASELINE, METHODS, Search
from arrag_jax.errors import UserError
from arrag_jax.evaluation.parts import SIDES, draw, fitted_mask, part_of, require_whole_runs
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.figures.canvas import RGBImage, upscale
from arrag_jax.parsing import in_range
from arrag_jax.web.requests import LIMITS, MOST_SEED

MOST_VARIATIONS = 4
MOST_GROWTH = 4  # times the model's own size


@dataclasses.dataclass(frozen=True)
class EditAsk:
    """What a visitor asks for: a part of a picture, drawn plain and with a method that retrieves.

    Attributes:
      picture: of any size; it is cropped to the shape of the model's grid.
      mask: True where it is drawn; None with a side.
      side: the side that grows, and by how many of the model's pixels; None with a mask.
    """

    prompt: str
    method: str
    seed: int
    variations: int
    picture: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None = None
    side: tuple[str, int] | None = None

    def __post_init__(self):
        if len(self.prompt) > LIMITS.prompt:
            raise UserError(f"the prompt has {len(self.prompt):,} characters, at most {LIMITS.prompt:,}")
        in_range("variations", self.variations, 1, MOST_VARIATIONS)
        in_range("seed", self.seed, 0, MOST_SEED - self.variations)
        if self.mask is not None and not self.mask.any():
            raise UserError("nothing is painted over; paint what is to be drawn")


def edited(pipeline: Pipeline, ask: EditAsk) -> tuple[list[RGBImage], list[RGBImage]]:
    """Returns the pictures, drawn plain and with the asked method; searches by codes use two-sided keys.

    Raises:
      UserError: if the prompt, the method or the part is not valid.
    """
    if ask.method not in pipeline.methods:
        raise UserError(f"method {ask.method!r} is not open here; choose one of {', '.join(pipeline.methods)}")
    model = pipeline.model
    if ask.side is not None:
        if ask.side[0] not in SIDES:
            raise UserError(f"side {ask.side[0]!r} is unknown; choose one of {', '.join(SIDES)}")
        in_range("pixels", ask.side[1], 1, MOST_GROWTH * max(model.image_size))
        require_whole_runs(ask.side, pipeline.config.sampling)
    mask = None if ask.mask is None else fitted_mask(ask.mask, model.image_size)
    part = part_of(model, shrunk(ask.picture, model.image_size), mask, ask.side, by="what is painted")
    prompts, seeds = [ask.prompt] * ask.variations, ask.seed + np.arange(ask.variations)
    pipeline.text.length(prompts)
    if METHODS[ask.method].search is Search.STORE:
        ahead = {Search.STORE: pipeline.searches[Search.STORE].two_sided}
        pipeline = dataclasses.replace(pipeline, searches={**pipeline.searches, **ahead})
    both = [
        [image for batch in draw(pipeline, part, prompts, method, seeds) for image in batch.images]
        for method in (BASELINE, ask.method)
    ]
    return both[0], both[1]


def shrunk(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> RGBImage:
    """Returns a picture at h x w = ``size``; one that was enlarged for the page is as it was before."""
    scale = picture.shape[0] // size[0]
    if scale and picture.shape[:2] == (scale * size[0], scale * size[1]):
        small = picture[::scale, ::scale]
        if (upscale(small, scale) == picture).all():
            return small
    return np.array(fitted(Image.fromarray(picture), size))


def painted(value: Mapping[str, Any] | None) -> tuple[RGBImage, Bool[np.ndarray, "h w"]]:
    """Returns the picture of Gradio's editor, and where any of its layers is painted.

    Raises:
      UserError: if there is no picture.
    """
    if not value or value.get("background") is None:
        raise UserError("there is no picture; take the drawn one, or give one of yours")
    picture = np.asarray(value["background"])[..., :3]
    mask = np.zeros(picture.shape[:2], bool)
    for layer in value.get("layers") or ():
        mask |= np.asarray(layer)[..., 3] > 0
    return picture, mask
