"""Draws figures: a white canvas for pixels and text, colours, and functions that resize images.

All images are uint8 [height, width, 3]. Small images are enlarged by integer factors without smoothing, so that the
figure shows the model's pixels. The palette is that of Okabe and Ito ("Color Universal Design", 2008), which
colour-blind readers can distinguish. Values are coloured with viridis.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from arrag_jax.figures.lettering import text_size, write

RGBImage = UInt8[np.ndarray, "_ _ 3"]

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
PALETTE = (BLUE, ORANGE, (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
INK, FAINT, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
MARGIN = 12  # pixels around and between the parts of a figure

# Viridis at equal steps; the luminance increases with the value.
_VALUE_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)


def upscale(image: RGBImage, scale: int) -> RGBImage:
    """Returns an image in which every pixel is a square of ``scale`` x ``scale`` pixels."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def value_color(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Returns the colour of a value between ``low`` (dark) and ``high`` (bright); light grey for NaN."""
    if not np.isfinite(value):
        return (225, 225, 225)
    place = (value - low) / (high - low) if high > low else 0.5
    steps = np.linspace(0, 1, len(_VALUE_COLORS))
    red, green, blue = (round(float(np.interp(place, steps, channel))) for channel in _VALUE_COLORS.T)
    return red, green, blue


def luminance(color: Sequence[int]) -> float:
    """Returns the perceived brightness of an sRGB colour, 0 to 255 (Rec. 601)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


class Canvas:
    """A white canvas for pixels and text."""

    def __init__(self, height: int, width: int):
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def paste(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Copies ``pixels`` to the canvas with their upper left corner at (x, y)."""
        self._image.paste(Image.fromarray(pixels), (x, y))

    def text(self, x: int, y: int, words: str, anchor: str, color: tuple[int, int, int] = INK) -> None:
        """Writes text so that the anchor point of its box is at (x, y).

        Args:
          anchor: two letters: l/m/r = left/middle/right, then a/m/d = top/middle/bottom.
        """
        width, height = text_size(words)
        x -= {"l": 0, "m": width // 2, "r": width}[anchor[0]]
        y -= {"a": 0, "m": height // 2, "d": height}[anchor[1]]
        write(self._draw, x, y, words, {"l": "left", "m": "center", "r": "right"}[anchor[0]], color)

    def pixels(self) -> RGBImage:
        """Returns the canvas as an image."""
        return np.array(self._image)


def fitted(image: RGBImage, side: int) -> RGBImage:
    """Returns an image scaled by an integer factor, so that its longer side is as close below ``side`` as possible."""
    longest = max(image.shape[:2])
    if longest <= side:
        return upscale(image, side // longest)
    return np.array(Image.fromarray(image).reduce(-(-longest // side)))


def greyed(image: RGBImage) -> RGBImage:
    """Returns the image in pale grey, so that coloured patches stand out."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.broadcast_to((110 + 0.55 * grey)[..., None], image.shape).astype(np.uint8)


def tinted(image: RGBImage, color: tuple[int, int, int], share: float = 0.25) -> RGBImage:
    """Returns the image mixed with a colour; ``share`` is the weight of the colour."""
    return ((1 - share) * image + share * np.array(color)).astype(np.uint8)


def framed(image: RGBImage, color: tuple[int, int, int], frame: int) -> RGBImage:
    """Returns the image with its outermost ``frame`` pixels in ``color``."""
    edged = np.empty_like(image)
    edged[:] = color
    edged[frame:-frame, frame:-frame] = image[frame:-frame, frame:-frame]
    return edged
