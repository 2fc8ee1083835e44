"""Training the VQ tokenizer."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.config import TrainConfig
from arrag_jax.errors import UserError
from arrag_jax.fields import Settings
from arrag_jax.figures import grids
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.registry import preset_of
from arrag_jax.models.vq_images import VQImages
from arrag_jax.nn.vq import from_uint8
from arrag_jax.store.images import reconstruct
from arrag_jax.training.loop import Batch, SampleImages, Scalars
from arrag_jax.training.shared import RunImages, psnr, rows_of_a_device, tokenizer_figures, write_manifest


@dataclasses.dataclass(frozen=True)
class TokenizerOptions(Settings):
    """Shape and loss weights of the tokenizer, and when a code counts as dead."""

    preset: str  # of models.registry.preset_of
    commitment: float = 0.25  # pulls latents to their codes
    codebook: float = 1.0  # pulls codes to their latents
    usage_decay: float = 0.98  # of the running share of cells a code takes
    dead_below: float = 0.02  # a code that takes less than this share of 1/V moves to a spare latent

    def __post_init__(self):
        preset_of(self.preset)
        for name in ("commitment", "codebook", "dead_below"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.usage_decay < 1:
            raise UserError(f"usage_decay={self.usage_decay} is outside [0, 1)")


class TokenizerTask:
    """VQ autoencoder: squared error of pixels, commitment, and revival of dead codes.

    No perceptual loss: the packaged LPIPS weights come as a pickle, which this project does not read.
    """

    trainable = nnx.Param
    best_metric = ("psnr", "max")

    def __init__(self, config: TrainConfig, options: TokenizerOptions):
        self.config, self.options = config, options
        shape = preset_of(options.preset)[1]
        self.tokens = math.prod(shape.grid)
        self.images = RunImages(config.data, shape.image_size)
        self.images.require_splits()  # before anything is written

    def init_model(self, rngs: nnx.Rngs) -> VQImages:
        """A model that holds its tokenizer alone."""
        training, shape = preset_of(self.options.preset)
        return training.tokenizer(shape, rngs)

    def base(self) -> dict[str, str]:
        """Nothing is frozen; which images it learns from."""
        return self.images.identity()

    def train_source(self) -> grain.MapDataset:
        """Images of the training split."""
        return grain.MapDataset.source(self.images.train).map(_image_alone)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first ``eval_examples`` of the held-out split."""
        return self.images.held_out_batches(batch_size, _image_alone)

    def loss(self, model: VQImages, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Reconstruction + codebook + commitment loss; notes which codes are used."""
        vq, images = model.vq, from_uint8(batch["image"])
        codes, latents = vq.encode(images)
        quantised = vq.codebook[codes]
        # The decoder sees the code; the encoder gets the decoder's gradient as if nothing had been rounded.
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
        """Moves dead codes to latents of this batch, which the loss has noted."""
        vq = model.vq
        dead = vq.usage[...] < self.options.dead_below / vq.config.codebook_size
        vq.codes[...] = jnp.where(dead[:, None], vq.spare[...], vq.codes[...])
        vq.usage[...] = jnp.where(dead, 1.0 / vq.config.codebook_size, vq.usage[...])

    def eval_metrics(self, model: VQImages, batch: Batch) -> Scalars:
        """Mean PSNR in dB of the pictures as they would be saved (clipped to [-1, 1])."""
        images = from_uint8(batch["image"])
        codes, latents = model.encode_images(images)
        return {"psnr": psnr(model.decode_codes(codes, *latents.shape[1:3]), images)}

    def sample_callback(self) -> Callable[[VQImages], SampleImages]:
        """Shows held-out images above their reconstructions."""
        images = next(self.eval_batches(12))["image"]

        def draw_samples(model: VQImages) -> SampleImages:
            decoded = reconstruct(model, images)
            return {"reconstructions": grids.grid(np.concatenate([images, decoded]), columns=len(images), scale=2)}

        return draw_samples

    def export(self, model: VQImages, directory: Path, run: dict[str, Any]) -> None:
        """The tokenizer as a model folder, with its held-out figures."""
        save_model(model, directory)
        figures = tokenizer_figures(model, self.eval_batches(rows_of_a_device(self.config)))
        write_manifest(directory, model, run, **figures)


def _image_alone(example: dict[str, Any]) -> Batch:
    return {"image": example["image"]}
