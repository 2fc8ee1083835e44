"""What the shapes of all models have in common: a decoder, an image tokenizer, a grid, and perhaps FAiD's blenders."""

import dataclasses
import operator
from typing import TypeVar

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.ops.grid import MOST_SIDE
from arrag_jax.parsing import shown

Shape = TypeVar("Shape", bound="ModelShape")


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The shape of a model; each family's config adds its own fields and defaults.

    Attributes:
      language: the decoder; None = an image tokenizer alone.
      vision: the image tokenizer.
      grid: height and width in codes.
      faid: FAiD's blenders; None = no blenders.
    """

    language: LlamaConfig | None = None
    vision: VQConfig = VQConfig()
    grid: tuple[int, int] = (24, 24)
    faid: FaidConfig | None = None

    @property
    def decoder(self) -> LlamaConfig:
        """``language`` of a model that has one."""
        if self.language is None:
            raise UserError("this is an image tokenizer alone, without the language model that draws")
        return self.language

    @property
    def blended_neighbors(self) -> int:
        """K of FAiD's blenders; 0 = the model has none."""
        return self.faid.neighbors if self.faid else 0

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.grid[0] * self.vision.downsampling, self.grid[1] * self.vision.downsampling

    def with_grid(self: Shape, grid: ArrayLike) -> Shape:
        """Returns the config of the same model for another grid of codes.

        Raises:
          UserError: if ``grid`` is not two whole numbers from 1 to 1024.
        """
        try:
            height, width = map(operator.index, grid)
        except (TypeError, ValueError):
            height = width = 0
        if not 1 <= min(height, width) <= max(height, width) <= MOST_SIDE:
            raise UserError(
                f"grid={shown(grid)} must be two whole numbers of cells, height and width, each at least 1 and at most "
                f"{MOST_SIDE}"
            )
        return dataclasses.replace(self, grid=(height, width))
