"""The shape of a Janus, and its presets: one per published size, and small ones that a laptop can train."""

import dataclasses

from arrag_jax.models.shape import ModelShape
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig

PAD = "<｜▁pad▁｜>"  # the pad token of Janus' tokenizers


@dataclasses.dataclass(frozen=True)
class JanusConfig(ModelShape):
    """The shape of a Janus: language model, image tokenizer, and the parts that join them."""

    language: LlamaConfig | None = LlamaConfig()
    aligner_depth: int = 2
    head_width: int = 2048
    pad_id: int = 100002  # fills the unconditional prompt; the default is ``PAD`` of Janus-Pro's tokenizer
    max_positions: int | None = None  # the most tokens of prompt and image that it was trained on; None = unknown

    @property
    def draws(self) -> bool:
        """Whether there is a language model. A vocabulary of 0, as in early exports of tokenizers, means none."""
        return self.language is not None and self.language.vocab_size > 0


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
