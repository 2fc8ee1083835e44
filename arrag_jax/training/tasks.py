"""What is trained: the tokenizer, and the prior (the language model over its codes)."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from arrag_jax.config import TrainConfig, parse
from arrag_jax.data.emoji_scenes import load_source
from arrag_jax.data.scenes import words
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.evaluation import pictures
from arrag_jax.evaluation.drawing import reconstruct
from arrag_jax.models.checkpoint import fingerprint, load_model, save_model
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.nn.variables import freeze
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.training.loop import Batch, Scalars, Task

BITS = 1 / math.log(2)


def make_task(config: TrainConfig) -> Task:
    """The task that a config names."""
    if config.preset not in PRESETS:
        raise UserError(f"config.preset={config.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    task, options = {"tokenizer": (TokenizerTask, TokenizerOptions), "prior": (PriorTask, PriorOptions)}[config.task]
    return task(config, parse(options, config.options, "config.options"))


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
    """Loss weights of the tokenizer, and when a code counts as dead."""

    commitment: float = 0.25  # pulls latents to their codes
    codebook: float = 1.0  # pulls codes to their latents
    usage_decay: float = 0.98  # of the running share of cells a code takes
    dead_below: float = 0.02  # a code that takes less than this share of 1/V moves to a spare latent


class TokenizerTask:
    """VQ autoencoder: squared error of pixels, commitment, and revival of dead codes.

    No perceptual loss: the packaged LPIPS weights come as a pickle, which this project does not read.
    """

    trainable = nnx.Param

    def __init__(self, config: TrainConfig, options: TokenizerOptions):
        self.config, self.options = config, options

    def init_model(self, rngs: nnx.Rngs) -> Janus:
        """A Janus that holds its tokenizer alone."""
        return Janus(PRESETS[self.config.preset], rngs, VISION)

    def train_source(self) -> grain.MapDataset:
        """Images of the training split."""
        data = self.config.data
        source = grain.MapDataset.source(load_source(data.name, data.train_split, data.data_dir))
        return source.map(lambda example: {"image": example["image"]})

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first ``eval_examples`` of the held-out split."""
        return held_out(self.config, batch_size, lambda example: {"image": example["image"]})

    def loss(self, model: Janus, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Reconstruction + codebook + commitment loss; notes which codes are used."""
        vq, images = model.gen_vision_model, from_uint8(batch["image"])
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

    def after_update(self, model: Janus, batch: Batch, key: Array) -> None:
        """Moves dead codes to latents of this batch."""
        vq = model.gen_vision_model
        dead = vq.usage[...] < self.options.dead_below / vq.config.codebook_size
        vq.codes[...] = jnp.where(dead[:, None], vq.spare[...], vq.codes[...])
        vq.usage[...] = jnp.where(dead, 1.0 / vq.config.codebook_size, vq.usage[...])

    def eval_metrics(self, model: Janus, batch: Batch) -> Scalars:
        """Mean PSNR in dB of the pictures as they would be saved (clipped to [-1, 1])."""
        images = from_uint8(batch["image"])
        codes, _ = model.gen_vision_model.encode(images)
        return {"psnr": psnr(model, images, codes)}

    def pictures(self, model: Janus) -> dict[str, np.ndarray]:
        """Held-out images above their reconstructions."""
        images = next(self.eval_batches(12))["image"]
        decoded = reconstruct(model, images)
        return {"reconstructions": pictures.grid(np.concatenate([images, decoded]), columns=12, scale=2)}

    def export(self, model: Janus, directory: Path, run: dict[str, Any]) -> None:
        """The tokenizer as a model folder, with its held-out figures."""
        save_model(model, directory)
        figures = tokenizer_figures(model, self.eval_batches(self.config.batch_size))
        write_manifest(directory, model, run, **figures)


@dataclasses.dataclass(frozen=True)
class PriorOptions:
    """Settings of the prior."""

    tokenizer: str  # export folder of a tokenizer run
    caption_dropout: float = 0.1  # share of prompts replaced by the unconditional one, for guidance
    prompt_length: int = 16  # tokens; a longer caption is an error
    cfg_scale: float = 2.0  # of the pictures drawn while training


class PriorTask:
    """Next-code prediction. Images are encoded inside the step, by the frozen tokenizer."""

    trainable = nnx.Param

    def __init__(self, config: TrainConfig, options: PriorOptions):
        self.config, self.options = config, options
        self.text = PromptTokenizer.of_words(words())

    def init_model(self, rngs: nnx.Rngs) -> Janus:
        """A fresh language model around the given tokenizer, whose codebook its code embedding starts from."""
        preset = PRESETS[self.config.preset]
        tokenizer = load_model(self.options.tokenizer, parts=VISION)
        if tokenizer.config.vision != preset.vision:
            raise UserError(
                f"config.options.tokenizer={self.options.tokenizer} is of another shape than preset "
                f"{self.config.preset}: {tokenizer.config.vision} against {preset.vision}"
            )
        language = dataclasses.replace(preset.language, vocab_size=self.text.vocab_size)
        model = Janus(dataclasses.replace(preset, language=language, pad_id=self.text.pad_id), rngs)
        model.gen_vision_model = tokenizer.gen_vision_model
        freeze(model.gen_vision_model)
        model.gen_embed.embedding[...] = tokenizer.codebook
        return model

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

    def after_update(self, model: Janus, batch: Batch, key: Array) -> None:
        """Nothing to mend."""

    def eval_metrics(self, model: Janus, batch: Batch) -> Scalars:
        """Held-out bits a code, prompts given."""
        return {"bits_per_code": self._cross_entropy(model, batch, batch["prompt_ids"]) * BITS}

    def pictures(self, model: Janus) -> dict[str, np.ndarray]:
        """Twelve held-out prompts, drawn with the same seeds every time."""
        batch = next(self.eval_batches(12))
        drawn = sample(
            model, batch["prompt_ids"], prompt_mask=batch["prompt_mask"],
            cfg_scale=self.options.cfg_scale, seed=self.config.seed,
        )  # fmt: skip
        images = to_uint8(model.decode_codes(drawn.codes, *model.grid))
        return {"samples": pictures.grid(np.concatenate([batch["image"], images]), columns=12, scale=2)}

    def export(self, model: Janus, directory: Path, run: dict[str, Any]) -> None:
        """The whole Janus as a model folder, language model in bfloat16, with the held-out figures of just that."""
        save_model(model, directory, "bfloat16")
        model = load_model(directory)
        self.text.save(directory)
        batches = [jax.tree.map(jnp.asarray, b) for b in self.eval_batches(self.config.batch_size)]
        bits = [(float(self.eval_metrics(model, b)["bits_per_code"]), len(b["image"])) for b in batches]
        mean = sum(value * rows for value, rows in bits) / sum(rows for _, rows in bits)
        write_manifest(directory, model, run, valid_bits_per_code=mean, **tokenizer_figures(model, batches))


def held_out(config: TrainConfig, batch_size: int, example) -> Iterator[Batch]:
    """Batches of the first ``eval_examples`` examples of the held-out split."""
    data = config.data
    source = load_source(data.name, f"{data.eval_split}[:{data.eval_examples}]", data.data_dir)
    for start in range(0, len(source), batch_size):
        rows = [example(source[i]) for i in range(start, min(start + batch_size, len(source)))]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def psnr(model: Janus, images: Float[Array, "B h w 3"], codes: Int[Array, "B H W"]) -> Float[Array, ""]:
    """Mean peak signal-to-noise ratio, in dB, of pictures decoded from codes."""
    decoded = jnp.clip(model.gen_vision_model.decode_codes(codes), -1, 1)
    error = jnp.mean((decoded - images) ** 2, axis=(1, 2, 3))
    return jnp.mean(10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10)))


def tokenizer_figures(model: Janus, batches: Iterable[Batch]) -> dict[str, float]:
    """PSNR in dB, and the share of codes that occur, over batches of held-out images."""
    used, total, count = np.zeros(model.codebook_size, bool), 0.0, 0
    for batch in batches:
        images = from_uint8(batch["image"])
        codes, latents = model.encode_images(images)
        used[np.unique(codes)] = True
        total += float(psnr(model, images, codes.reshape(latents.shape[:3]))) * len(images)
        count += len(images)
    return {"psnr_db": total / count, "codes_used": float(used.mean())}


def write_manifest(directory: Path, model: Janus, run: dict[str, Any], **figures: float) -> None:
    """``manifest.json``: what a checkpoint reached, where it comes from, and the sum of its weights' bytes."""
    manifest = {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "tokenizer_fingerprint": fingerprint(model),
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        **run,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
