"""The task that trains the VQ tokenizer."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.fields import Settings
from arrag_jax.figures import grids
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.registry import preset_of
from arrag_jax.models.vq_images import VQImages, with_whole_tokenizer
from arrag_jax.nn.variables import Statistic
from arrag_jax.nn.vq import VQTokenizer, from_uint8
from arrag_jax.store.images import reconstruct
from arrag_jax.training.shared import (
    RunImages,
    psnr,
    rows_of_a_device,
    tokenizer_figures,
    write_manifest,
)
from arrag_jax.training.task import Batch, SampleImages, Scalars


@dataclasses.dataclass(frozen=True)
class TokenizerOptions(Settings):
    """Settings of the tokenizer: its preset, its loss weights, and when a code counts as dead."""

    preset: str  # name of a model preset; see models.registry.preset_of
    commitment: float = 0.25  # weight of the loss that pulls latents to their codes
    codebook: float = 1.0  # weight of the loss that pulls codes to their latents
    usage_decay: float = 0.98  # decay of the moving average of each code's share of the positions
    dead_below: float = 0.02  # a code with a usage below this, times 1/V, is dead and is replaced by a spare latent

    def __post_init__(self):
        preset_of(self.preset)
        for name in ("commitment", "codebook", "dead_below"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.usage_decay < 1:
            raise UserError(f"usage_decay={self.usage_decay} is outside [0, 1)")


class TokenizerStep:
    """The step that trains a VQ autoencoder with squared pixel error and commitment loss, and revives dead codes.

    There is no perceptual loss, because the published LPIPS weights are a pickle file, and this project reads none.
    """

    trainable = nnx.Param
    best_metric = ("psnr", "max")
    vocabulary = MappingProxyType[str, int]({})  # it reads no prompts

    def __init__(self, config: TrainConfig, options: TokenizerOptions):
        self.config, self.options = config, options
        self.fresh, self.shape = preset_of(options.preset)
        self.tokens = math.prod(self.shape.grid)

    def load(self, mesh: Mesh | None) -> tuple[()]:
        """Returns nothing, because the tokenizer is trained from scratch."""
        return ()

    def shapes(self) -> tuple[()]:
        """Returns the same as ``load``."""
        return ()

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of one training example."""
        return {"image": jax.ShapeDtypeStruct((*self.shape.image_size, 3), jnp.uint8)}

    def init_model(self, rngs: nnx.Rngs, loaded: Any = None) -> VQImages:
        """Returns a model that contains only the tokenizer."""
        model = self.fresh.tokenizer(self.shape, rngs)
        count_codes(model.vq, trained=bool(self.config.init_from))
        return model

    def loss(self, model: VQImages, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Returns reconstruction + codebook + commitment loss; also updates the usage of the codes."""
        vq, images = cast(CountedTokenizer, model.vq), from_uint8(batch["image"])
        codes, latents = vq.encode(images)
        quantised = vq.codebook[codes]
        # Straight-through estimator: the decoder gets the code, the encoder gets the decoder's gradient.
        decoded = vq.decode(latents + jax.lax.stop_gradient(quantised - latents))
        reconstruction = jnp.mean((decoded - images) ** 2)
        to_latents = jnp.mean((quantised - jax.lax.stop_gradient(latents)) ** 2)
        to_codes = jnp.mean((jax.lax.stop_gradient(quantised) - latents) ** 2)
        self._note_usage(vq, codes, latents, key)
        loss = reconstruction + self.options.codebook * to_latents + self.options.commitment * to_codes
        used = jnp.mean(vq.usage[...] > 0.1 / vq.config.codebook_size)
        return loss, {"reconstruction": reconstruction, "quantisation": to_latents, "codes_in_use": used}

    def _note_usage(self, vq, codes, latents, key) -> None:
        size, decay = vq.config.codebook_size, self.options.usage_decay
        share = jnp.bincount(codes.reshape(-1), length=size) / codes.size
        vq.usage[...] = jax.lax.stop_gradient(decay * vq.usage[...] + (1 - decay) * share)
        flat = latents.reshape(-1, latents.shape[-1])
        picks = jax.random.randint(key, (size,), 0, len(flat))
        vq.spare[...] = jax.lax.stop_gradient(flat[picks])

    def after_update(self, model: VQImages, key: Array) -> None:
        """Replaces dead codes with latents of this batch, which the loss has stored."""
        vq = cast(CountedTokenizer, model.vq)
        dead = vq.usage[...] < self.options.dead_below / vq.config.codebook_size
        vq.codes[...] = jnp.where(dead[:, None], vq.spare[...], vq.codes[...])
        vq.usage[...] = jnp.where(dead, 1.0 / vq.config.codebook_size, vq.usage[...])

    def eval_metrics(self, model: VQImages, batch: Batch) -> Scalars:
        """Returns the mean PSNR in dB of the reconstructions, clipped to [-1, 1] as in a saved image."""
        images = from_uint8(batch["image"])
        codes, latents = model.encode_images(images)
        return {"psnr": psnr(model.decode_codes(codes, *latents.shape[1:3]), images)}


class TokenizerTask(TokenizerStep):
    """The step with its images."""

    def __init__(self, config: TrainConfig, options: TokenizerOptions):
        super().__init__(config, options)
        self.images = RunImages(config.data, self.shape.image_size)
        self.images.require_splits()  # fails before anything is written

    def base(self) -> dict[str, str]:
        """Returns the identity of the training images; nothing is frozen."""
        return self.images.identity()

    def train_source(self) -> grain.MapDataset:
        """Returns the images of the training split."""
        return grain.MapDataset.source(self.images.train).map(_image_alone)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of the first ``eval_examples`` images of the held-out split."""
        return self.images.held_out_batches(batch_size, _image_alone)

    def sample_callback(self, mesh: Mesh) -> Callable[[VQImages], SampleImages]:
        """Returns a function that shows held-out images above their reconstructions."""
        images = next(self.eval_batches(12))["image"]

        def draw_samples(model: VQImages) -> SampleImages:
            decoded = reconstruct(with_whole_tokenizer(model, mesh), images)
            return {"reconstructions": grids.grid(np.concatenate([images, decoded]), columns=len(images), scale=2)}

        return draw_samples

    def export(self, model: VQImages, directory: Path, run: dict[str, Any]) -> None:
        """Writes the tokenizer as a model folder, with its held-out metrics."""
        save_model(model, directory)
        figures = tokenizer_figures(model, self.eval_batches(rows_of_a_device(self.config)))
        write_manifest(directory, model, run, **figures)


class CountedTokenizer(VQTokenizer):
    """The type of a tokenizer after ``count_codes``.

    Attributes:
      usage: [V], moving average of each code's share of the positions.
      spare: [V, C], latents that replace dead codes.
    """

    usage: Statistic
    spare: Statistic


def count_codes(vq: VQTokenizer, trained: bool) -> None:
    """Adds what revives dead codes to a tokenizer, in place.

    Every code of a trained codebook counts as used. Of a random one no code does, so that the first revival replaces
    every code by a latent of the first batch; with random codes, the encoder would soon use only a few of them.
    """
    size, dim = vq.config.codebook_size, vq.config.code_dim
    counted = cast(CountedTokenizer, vq)
    counted.usage = Statistic(jnp.full(size, 1.0 / size if trained else 0.0))
    counted.spare = Statistic(jnp.zeros((size, dim)))


def _image_alone(example: dict[str, Any]) -> Batch:
    return {"image": example["image"]}
