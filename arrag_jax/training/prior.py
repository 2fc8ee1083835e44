"""Training the prior: the language model over the tokenizer's codes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.config import TrainConfig, require_guidance
from arrag_jax.data.examples import BadImage, caption_of
from arrag_jax.data.readable import ReadableImages
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.fields import LocalPath, Settings
from arrag_jax.figures import grids
from arrag_jax.models.checkpoint import load_model, save_model, tokenizer_fingerprint
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.text import PromptTokenizer, words_in
from arrag_jax.nn.variables import freeze
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.training.loop import Batch, Pictures, Scalars
from arrag_jax.training.shared import (
    BITS,
    RunImages,
    check_preset,
    made_by,
    mean_bits,
    rows_of_a_device,
    tokenizer_figures,
    write_manifest,
)


@dataclasses.dataclass(frozen=True)
class PriorOptions(Settings):
    """Settings of the prior."""

    preset: str  # a key of models.presets.PRESETS
    tokenizer: LocalPath  # export folder of a tokenizer run
    caption_dropout: float = 0.1  # share of prompts replaced by the unconditional one, for guidance
    prompt_length: int = 16  # tokens; a longer caption is an error
    cfg_scale: float = 2.0  # of the pictures drawn while training

    def __post_init__(self):
        check_preset(self.preset)
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout={self.caption_dropout} is outside [0, 1]")
        if self.prompt_length < 1:
            raise UserError(f"prompt_length={self.prompt_length} must be at least 1")
        require_guidance(self.cfg_scale)


class PriorTask:
    """Next-code prediction. Images are encoded inside the step, by the frozen tokenizer.

    The vocabulary is the words of the training split's captions, or all words of the source where it knows them. Words
    that only held-out captions have are left out of their prompts.
    """

    trainable = nnx.Param
    best_metric = ("bits_per_code", "min")

    def __init__(self, config: TrainConfig, options: PriorOptions):
        self.config, self.options = config, options
        self.tokens = math.prod(PRESETS[options.preset].grid)
        self.tokenizer = load_model(options.tokenizer, parts=VISION)
        self.images = RunImages(
            config.data, PRESETS[options.preset].image_size, lambda caption: bool(self._prompt(caption))
        )
        self.words = None  # while the captions that give them are read
        self.words = frozenset(self._vocabulary())
        self.text = PromptTokenizer.of_words(self.words)
        self.images.require_splits()  # before anything is written
        if self.images.source.words is None:
            for images in (self.images.train, self.images.held_out):
                self._require_short_prompts(images)

    def init_model(self, rngs: nnx.Rngs) -> Janus:
        """A fresh language model around the given tokenizer, whose codebook its code embedding starts from."""
        preset, tokenizer = PRESETS[self.options.preset], self.tokenizer
        if tokenizer.config.vision != preset.vision:
            raise UserError(
                f"config.options.tokenizer={self.options.tokenizer} is of another shape than preset "
                f"{self.options.preset}: {tokenizer.config.vision} against {preset.vision}"
            )
        language = dataclasses.replace(preset.language, vocab_size=self.text.vocab_size)
        longest = self.options.prompt_length + self.tokens
        shape = dataclasses.replace(preset, language=language, pad_id=self.text.pad_id, max_positions=longest)
        model = Janus(shape, rngs)
        model.gen_vision_model = tokenizer.gen_vision_model
        freeze(model.gen_vision_model)
        model.gen_embed.embedding[...] = tokenizer.codebook
        return model

    def base(self) -> dict[str, str]:
        """The frozen tokenizer, and which images and captions it learns from."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer), **self.images.identity()}

    def _vocabulary(self) -> Iterable[str]:
        """The words of the source, else those of the training split's captions."""
        if self.images.source.words is not None:
            return self.images.source.words
        return (word for _, caption in _captions(self.images.train) for word in words_in(caption))

    def _prompt(self, caption: str) -> str:
        """The words of a caption that are in the vocabulary."""
        return " ".join(word for word in words_in(caption) if self.words is None or word in self.words)

    def _example(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        ids, mask = self.text([self._prompt(caption_of(example))], self.options.prompt_length)
        return {"image": example["image"], "prompt_ids": ids[0], "prompt_mask": mask[0]}

    def _require_short_prompts(self, images: ReadableImages) -> None:
        """Raises UserError if a prompt is longer than ``prompt_length``."""
        lengths = {name: int(self.text([self._prompt(caption)])[1].sum()) for name, caption in _captions(images)}
        name = max(lengths, key=lengths.get, default=None)
        if name is not None and lengths[name] > self.options.prompt_length:
            raise UserError(
                f"config.options.prompt_length={self.options.prompt_length} is too short: the prompt of {name} has "
                f"{lengths[name]} tokens; give at least as many, or shorten its caption"
            )

    def train_source(self) -> grain.MapDataset:
        """Images with their prompts."""
        return grain.MapDataset.source(self.images.train).map(self._example)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first ``eval_examples`` of the held-out split."""
        return self.images.held_out_batches(batch_size, self._example)

    def loss(self, model: Janus, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Mean cross-entropy of the codes, in nats; some prompts are dropped for guidance."""
        ids = batch["prompt_ids"]
        dropped = jax.random.bernoulli(key, self.options.caption_dropout, (len(ids),))
        empty = model.unconditional(ids, batch["prompt_mask"])
        loss = self._cross_entropy(model, batch, jnp.where(dropped[:, None], empty, ids))
        return loss, {"bits_per_code": loss * BITS}

    def _cross_entropy(self, model: Janus, batch: Batch, ids: Array) -> Float[Array, ""]:
        codes = model.gen_vision_model.encode(from_uint8(batch["image"]))[0].reshape(len(ids), -1)
        logits = model.teacher_forced(ids, batch["prompt_mask"], jax.lax.stop_gradient(codes))
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    def after_update(self, model: Janus, key: Array) -> None:
        """Nothing to mend."""

    def eval_metrics(self, model: Janus, batch: Batch) -> Scalars:
        """Held-out bits a code, prompts given."""
        return {"bits_per_code": self._cross_entropy(model, batch, batch["prompt_ids"]) * BITS}

    def sample_callback(self) -> Callable[[Janus], Pictures]:
        """Draws twelve held-out prompts with the same seeds every time."""
        batch = next(self.eval_batches(12))

        def paint(model: Janus) -> Pictures:
            drawn = sample(
                model, batch["prompt_ids"], prompt_mask=batch["prompt_mask"],
                cfg_scale=self.options.cfg_scale, seed=self.config.seed,
            )  # fmt: skip
            images = to_uint8(model.decode_codes(drawn.codes, *model.grid))
            return {"samples": grids.grid(np.concatenate([batch["image"], images]), columns=len(images), scale=2)}

        return paint

    def export(self, model: Janus, directory: Path, run: dict[str, Any]) -> None:
        """The whole Janus as a model folder, language model in bfloat16, with the held-out figures of just that."""
        save_model(model, directory, "bfloat16")
        model = load_model(directory)
        self.text.save(directory)
        batches = list(self.eval_batches(rows_of_a_device(self.config)))
        figures = {"valid_bits_per_code": mean_bits(self, model, batches), **tokenizer_figures(model, batches)}
        write_manifest(directory, model, run | {"tokenizer": made_by(self.options.tokenizer)}, **figures)


def _captions(images: ReadableImages) -> Iterator[tuple[str, str]]:
    """Ids and captions of images, without those that are known to be unreadable."""
    for number in range(len(images)):
        with contextlib.suppress(BadImage):
            yield images.images.source_id(number), images.images.caption(number)
