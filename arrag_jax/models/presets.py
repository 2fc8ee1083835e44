"""The shape of a Janus, and its presets: one per published size, and small ones that a laptop can train."""

import dataclasses
import operator

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.nn.transformer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.ops.grid import MOST_SIDE
from arrag_jax.parsing import shown

PAD = "<｜▁pad▁｜>"  # the pad token of Janus' tokenizers


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """The shape of a Janus: language model, image tokenizer, and the parts that join them."""

    language: LlamaConfig | None = LlamaConfig()  # None = an image tokenizer alone
    vision: VQConfig = VQConfig()
    grid: tuple[int, int] = (24, 24)
    aligner_depth: int = 2
    head_width: int = 2048
    pad_id: int = 100002  # fills the unconditional prompt; the default is ``PAD`` of Janus-Pro's tokenizer
    max_positions: int | None = None  # the most tokens of prompt and image that it was trained on; None = unknown
    faid: FaidConfig | None = None  # None = no blenders

    @property
    def decoder(self) -> LlamaConfig:
        """``language`` of a model that has one."""
        if self.language is None:
            raise UserError("this is an image tokenizer alone, without the language model that draws")
        return self.language

    @property
    def draws(self) -> bool:
        """Whether there is a language model. A vocabulary of 0, as in early exports of tokenizers, means none."""
        return self.language is not None and self.language.vocab_size > 0

    @property
    def blended_neighbors(self) -> int:
        """K of FAiD's blenders; 0 = the model has none."""
        return self.faid.neighbors if self.faid else 0

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.grid[0] * self.vision.downsampling, self.grid[1] * self.vision.downsampling

    def with_grid(self, grid: ArrayLike) -> "JanusConfig":
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


# 48 x 48 pixels, downsampling 4, 12 x 12 codes. Training takes vocab_size and pad_id from the caption tokenizer.
_EMOJI = JanusConfig(
    language=LlamaConfig(vocab_size=0, width=192, layers=6, heads=3, kv_heads=3, mlp=512),
    vision=VQConfig(
        codebook_size=512, channels=16, multipliers=(1, 2, 4), z_channels=64, res_blocks=1,
        norm_scope="pixel", encoder_kernel=1, middle=False,
    ),
    grid=(12, 12),
    head_width=192,
)  # fmt: skip
PRESETS = {
    # docs/reference.md "Backbone".
    "janus-pro-1b": JanusConfig(),
    "janus-pro-7b": JanusConfig(
        language=LlamaConfig(width=4096, layers=30, heads=32, kv_heads=32, mlp=11008), head_width=4096
    ),
    "janus-emoji": _EMOJI,
    # Twice the codes, because the long-tailed world has four times the classes.
    "janus-long-tail": dataclasses.replace(_EMOJI, vision=dataclasses.replace(_EMOJI.vision, codebook_size=1024)),
}
