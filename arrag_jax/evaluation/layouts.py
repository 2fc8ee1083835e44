"""How the images of a prompt set are named in a folder: as each benchmark's official scorer reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax.errors import UserError
from arrag_jax.evaluation.image_codes import add_codes, codes_in
from arrag_jax.figures.grids import save
from arrag_jax.interfaces import Prompt

COPIES = ".copies"  # holds the images of a grid until all of them are drawn


class Flat:
    """NAME.png, or NAME_0000.png, NAME_0001.png, … with several images per prompt."""

    name: ClassVar[str] = "flat"

    def drawn(self, prompt: Prompt, copy: int, copies: int) -> str:
        """Returns the path, relative to the folder, of an image as it is drawn."""
        return f"{prompt.name}.png" if copies == 1 else f"{prompt.name}_{copy:04d}.png"

    def files(self, prompt: Prompt, copies: int) -> list[str]:
        """Returns the relative paths of a prompt's image files in a complete folder."""
        return [self.drawn(prompt, copy, copies) for copy in range(copies)]

    def beside(self, prompt: Prompt) -> dict[str, str]:
        """Returns further files of a prompt: relative path and content."""
        del prompt
        return {}

    def finish(self, folder: Path, prompt: Prompt, copies: int) -> None:
        """Makes the files of a prompt from its drawn images, if these are not the files themselves."""


class GenEvalFolders(Flat):
    """GenEval's: NAME/metadata.jsonl with the prompt's line, and NAME/samples/0000.png, 0001.png, …"""

    name: ClassVar[str] = "geneval"

    def drawn(self, prompt: Prompt, copy: int, copies: int) -> str:
        """Returns the path of a sample."""
        del copies
        return f"{prompt.name}/samples/{copy:04d}.png"

    def beside(self, prompt: Prompt) -> dict[str, str]:
        """Returns the metadata file."""
        return {f"{prompt.name}/metadata.jsonl": prompt.line}


class Grids(Flat):
    """DPG-Bench's: NAME.png, four images in a grid of 2 x 2, row by row; with one image per prompt the image itself."""

    name: ClassVar[str] = "dpg"

    def drawn(self, prompt: Prompt, copy: int, copies: int) -> str:
        """Returns the path of an image; those of a grid wait in a hidden folder."""
        return f"{prompt.name}.png" if copies == 1 else f"{COPIES}/{prompt.name}_{copy:04d}.png"

    def files(self, prompt: Prompt, copies: int) -> list[str]:
        """Returns the one file of a prompt."""
        del copies
        return [f"{prompt.name}.png"]

    def finish(self, folder: Path, prompt: Prompt, copies: int) -> None:
        """Writes the grid of a prompt and removes its images, if they are there."""
        paths = [folder / self.drawn(prompt, copy, copies) for copy in range(copies)]
        if copies == 1 or not all(path.exists() for path in paths):
            return
        images, info = [read_rgb(path) for path in paths], PngInfo()
        codes = [found for path in paths if (found := codes_in(path)) is not None]
        if len(codes) == copies:
            add_codes(info, joined([grid for grid, _ in codes]), codes[0][1])
        save(folder / f"{prompt.name}.png", joined(images), info)
        for path in paths:
            path.unlink()


def joined(images: Sequence[Shaped[np.ndarray, "h w *c"]]) -> Shaped[np.ndarray, "2*h 2*w *c"]:
    """Returns four images, or the codes of four, in a grid of 2 x 2, row by row."""
    return np.concatenate([np.concatenate(images[:2], 1), np.concatenate(images[2:], 1)])


def read_rgb(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an image file.

    Raises:
      UserError: if it is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises these for damaged files
        raise UserError(f"{path} is not a whole image ({error}); delete it, and draw it again") from None
