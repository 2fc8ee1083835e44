"""Random pictures, and where one stands in a page."""

import numpy as np


def random_images(seed: int, count: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def find(page: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """(row, column) of the one place where ``part`` stands in ``page``, exactly."""
    height, width = part.shape[:2]
    corners = np.argwhere((page[: -height + 1 or None, : -width + 1 or None] == part[0, 0]).all(-1))
    places = [(y, x) for y, x in corners if (page[y : y + height, x : x + width] == part).all()]
    assert len(places) == 1
    return places[0]
