"""Training the prior: the language model over the tokenizer's codes."""

import dataclasses
import math
from collections.abc import Callable, Iterator
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
from arrag_jax.data.emoji.dataset import load_source
from arrag_jax.data.emoji.scenes import words
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.fields import LocalPath, Settings
from arrag_jax.figures import grids
from arrag_jax.interfaces import Condition, ImageModel
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.models.registry import preset
from arrag_jax.nn.variables import freeze
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.training.loop import Batch, Pictures, Scalars
from arrag_jax.training.shared import (
    BITS,
    check_preset,
    held_out,
    made_by,
    mean_bits,
    rows_of_a_device,
    tokenizer_figures,
    write_manifest,
)


@dataclasses.dataclass(frozen=True)
class PriorOptions(Settings):
    """Settings of the prior."""

    preset: str  # of models.registry.trained_presets
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
    """Next-code prediction. Images are encoded inside the step, by the frozen tokenizer."""

    trainable = nnx.Param
    best_metric = ("bits_per_code", "min")

    def __init__(self, config: TrainConfig, options: PriorOptions):
        self.config, self.options = config, options
        self.family, self.shape = preset(options.preset)
        self.tokens = math.prod(self.shape.grid)
        self.text = self.family.training.text(words())
        self.tokenizer = load_tokenizer(options.tokenizer)

    def init_model(self, rngs: nnx.Rngs) -> ImageModel:
        """A fresh language model around the given tokenizer, whose codebook its code embedding starts from."""
        options, make = self.options, self.family.training.prior
        try:
            model = make(self.shape, self.tokenizer, self.text, options.prompt_length, rngs)
        except UserError as error:
            given = f"config.options.tokenizer={options.tokenizer}"
            raise UserError(f"{given} is of another shape than preset {options.preset}: {error}") from error
        freeze(model.vq)
        return model

    def base(self) -> dict[str, str]:
        """The frozen tokenizer."""
        return {"tokenizer": self.tokenizer.fingerprint}

    def _example(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        ids, mask = self.text([example["caption"].decode()], self.options.prompt_length)
        return {"image": example["image"], "prompt_ids": ids[0], "prompt_mask": mask[0]}

    def train_source(self) -> grain.MapDataset:
        """Images with their prompts."""
        data = self.config.data
        return grain.MapDataset.source(load_source(data.name, data.train_split, data.data_dir)).map(self._example)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first ``eval_examples`` of the held-out split."""
        return held_out(self.config, batch_size, self._example)

    def loss(self, model: ImageModel, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Mean cross-entropy of the codes, in nats; some prompts are dropped for guidance."""
        ids, mask = batch["prompt_ids"], batch["prompt_mask"]
        dropped = jax.random.bernoulli(key, self.options.caption_dropout, (len(ids),))
        empty, _ = model.unconditional((ids, mask))
        loss = self._cross_entropy(model, batch, (jnp.where(dropped[:, None], empty, ids), mask))
        return loss, {"bits_per_code": loss * BITS}

    def _cross_entropy(self, model: ImageModel, batch: Batch, condition: Condition) -> Float[Array, ""]:
        codes = model.encode_images(from_uint8(batch["image"]))[0]
        logits = model.teacher_forced(condition, jax.lax.stop_gradient(codes))
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    def after_update(self, model: ImageModel, key: Array) -> None:
        """Nothing to mend."""

    def eval_metrics(self, model: ImageModel, batch: Batch) -> Scalars:
        """Held-out bits a code, prompts given."""
        return {"bits_per_code": self._cross_entropy(model, batch, (batch["prompt_ids"], batch["prompt_mask"])) * BITS}

    def sample_callback(self) -> Callable[[ImageModel], Pictures]:
        """Draws twelve held-out prompts with the same seeds every time."""
        batch = next(self.eval_batches(12))

        def paint(model: ImageModel) -> Pictures:
            drawn = sample(
                model, batch["prompt_ids"], prompt_mask=batch["prompt_mask"],
                cfg_scale=self.options.cfg_scale, seed=self.config.seed,
            )  # fmt: skip
            images = to_uint8(model.decode_codes(drawn.codes, *model.grid))
            return {"samples": grids.grid(np.concatenate([batch["image"], images]), columns=12, scale=2)}

        return paint

    def export(self, model: ImageModel, directory: Path, run: dict[str, Any]) -> None:
        """The whole model as a folder, language model in bfloat16, with the held-out figures of just that."""
        save_model(model, directory, "bfloat16")
        model = load_model(directory)
        self.text.save(directory)
        batches = list(self.eval_batches(rows_of_a_device(self.config)))
        figures = {"valid_bits_per_code": mean_bits(self, model, batches), **tokenizer_figures(model, batches)}
        write_manifest(directory, model, run | {"tokenizer": made_by(self.options.tokenizer)}, **figures)
