"""An image's codes in its PNG file, so that copies can be looked for: encoding the pixels again gives other codes."""

from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "codes"  # of the text chunk: fingerprint of the tokenizer, height, width, then the codes row by row


def add_codes(info: PngInfo, codes: Integer[np.ndarray, "H W"], tokenizer: str) -> None:
    """Adds an image's codes, and the fingerprint of their tokenizer, to the text chunks of its file."""
    info.add_text(KEY, " ".join([tokenizer, *map(str, [*codes.shape, *codes.ravel().tolist()])]), zip=True)


def codes_in(path: Path) -> tuple[Int[np.ndarray, "H W"], str] | None:
    """Returns the codes that an image file holds, and the fingerprint of their tokenizer.

    A file that is a grid of images holds their codes as a grid.

    Returns:
      None if it holds no codes, or they are damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            tokenizer, *numbers = image.info.get(KEY, "").split()
        height, width, *codes = map(int, numbers)
    except (OSError, SyntaxError, ValueError):  # what PIL raises for damaged files, and int for other texts
        return None
    if min(height, width) < 1 or len(codes) != height * width or min(codes) < 0:
        return None
    return np.array(codes).reshape(height, width), tokenizer
