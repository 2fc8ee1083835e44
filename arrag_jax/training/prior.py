"""The task that trains the prior: the language model over the tokenizer's codes."""

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
from jax.sharding import Mesh
from jaxtyping import Array, Float

from arrag_jax.config import TrainConfig, require_guidance
from arrag_jax.data.examples import BadImage, caption_of
from arrag_jax.data.readable import ReadableImages
from arrag_jax.errors import UserError
from arrag_jax.fields import ModelPath, Settings
from arrag_jax.figures import grids
from arrag_jax.interfaces import Condition, ImageModel
from arrag_jax.mesh import put_state
from arrag_jax.models.checkpoint import load_model, load_tokenizer, save_model
from arrag_jax.models.registry import preset_of
from arrag_jax.models.text import words_in
from arrag_jax.nn.vq import from_uint8
from arrag_jax.training.shared import (
    BITS,
    RunImages,
    draw,
    made_by,
    mean_bits,
    mesh_of_export,
    rows_of_a_device,
    tokenizer_figures,
    write_manifest,
)
from arrag_jax.training.task import Batch, SampleImages, Scalars


@dataclasses.dataclass(frozen=True)
class PriorOptions(Settings):
    """Settings of the prior."""

    preset: str  # name of a model preset; see models.registry.preset_of
    tokenizer: ModelPath  # export folder of a tokenizer's training run
    caption_dropout: float = 0.1  # share of prompts that are replaced by the unconditional one, for guidance
    prompt_length: int = 16  # tokens per prompt; a longer caption is an error
    cfg_scale: float = 2.0  # guidance scale of the sample images

    def __post_init__(self):
        preset_of(self.preset)
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout={self.caption_dropout} is outside [0, 1]")
        if self.prompt_length < 1:
            raise UserError(f"prompt_length={self.prompt_length} must be at least 1")
        require_guidance(self.cfg_scale)


class PriorStep:
    """The step of next-code prediction. The frozen tokenizer encodes the images inside the step."""

    trainable = nnx.Param
    best_metric = ("bits_per_code", "min")

    def __init__(self, config: TrainConfig, options: PriorOptions, words: Iterable[str] = ()):
        """Creates the step; ``words`` are the vocabulary of the prompts."""
        self.config, self.options = config, options
        self.fresh, self.shape = preset_of(options.preset)
        self.tokens = math.prod(self.shape.grid)
        self.text = self.fresh.text(words)

    def load(self, mesh: Mesh | None) -> Any:
        """Returns the frozen tokenizer as its graph and its arrays, which lie on the mesh."""
        raise NotImplementedError

    def shapes(self) -> Any:
        """Returns the same as ``load``, shapes instead of arrays; reads no file."""
        return nnx.split(nnx.eval_shape(lambda: self.fresh.tokenizer(self.shape, nnx.Rngs(0))))

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of one training example."""
        length = (self.options.prompt_length,)
        return {
            "image": jax.ShapeDtypeStruct((*self.shape.image_size, 3), jnp.uint8),
            "prompt_ids": jax.ShapeDtypeStruct(length, jnp.int32),
            "prompt_mask": jax.ShapeDtypeStruct(length, bool),
        }

    def init_model(self, rngs: nnx.Rngs, loaded: Any = None) -> ImageModel:
        """Returns a new language model with the given tokenizer; its code embedding starts from the codebook."""
        options, tokenizer = self.options, nnx.merge(*(self.load(None) if loaded is None else loaded), copy=True)
        try:
            model: Any = self.fresh.prior(self.shape, tokenizer, self.text, options.prompt_length, rngs)
        except UserError as error:
            given = f"config.options.tokenizer={options.tokenizer}"
            raise UserError(f"{given} is of another shape than preset {options.preset}: {error}") from error
        model.language_model.remat = self.config.remat
        return model

    def loss(self, model: ImageModel, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Returns the mean cross-entropy of the codes, in nats; some prompts are dropped for guidance."""
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
        """Does nothing."""

    def eval_metrics(self, model: ImageModel, batch: Batch) -> Scalars:
        """Returns the held-out bits per code, given the prompts."""
        return {"bits_per_code": self._cross_entropy(model, batch, (batch["prompt_ids"], batch["prompt_mask"])) * BITS}


class PriorTask(PriorStep):
    """The step with its tokenizer, its images and their captions.

    The vocabulary is the set of words in the training split's captions, or all words of the source if it declares them.
    Words that occur only in held-out captions are removed from their prompts.
    """

    def __init__(self, config: TrainConfig, options: PriorOptions):
        super().__init__(config, options)
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.images = RunImages(config.data, self.shape.image_size, lambda caption: bool(self._prompt(caption)))
        self.words = None  # no word is removed while the vocabulary is collected
        self.words = frozenset(self._vocabulary())
        self.text = self.fresh.text(self.words)
        self.vocabulary = self.text.vocabulary
        self.images.require_splits()  # fails before anything is written
        if self.images.source.words is None:
            for images in (self.images.train, self.images.held_out):
                self._require_short_prompts(images)

    def load(self, mesh: Mesh | None) -> Any:
        """Returns the frozen tokenizer as its graph and its arrays, which lie on the mesh."""
        graph, state = nnx.split(self.tokenizer)
        state = jax.tree.map(jnp.copy, state)  # because the training takes over what it is given
        return graph, state if mesh is None else put_state(state, mesh)

    def base(self) -> dict[str, str]:
        """Returns the identity of the frozen tokenizer and of the training images and captions."""
        return {"tokenizer": self.tokenizer.fingerprint, **self.images.identity()}

    def _vocabulary(self) -> Iterable[str]:
        """Returns the words of the source, or else those of the training split's captions."""
        if self.images.source.words is not None:
            return self.images.source.words
        return (word for _, caption in _captions(self.images.train) for word in words_in(caption))

    def _prompt(self, caption: str) -> str:
        """Returns the words of a caption that are in the vocabulary."""
        return " ".join(word for word in words_in(caption) if self.words is None or word in self.words)

    def _example(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        ids, mask = self.text([self._prompt(caption_of(example))], self.options.prompt_length)
        return {"image": example["image"], "prompt_ids": ids[0], "prompt_mask": mask[0]}

    def _require_short_prompts(self, images: ReadableImages) -> None:
        """Raises UserError if a prompt is longer than ``prompt_length``."""
        lengths = {name: int(self.text([self._prompt(caption)])[1].sum()) for name, caption in _captions(images)}
        name = max(lengths, key=lengths.__getitem__, default=None)
        if name is not None and lengths[name] > self.options.prompt_length:
            raise UserError(
                f"config.options.prompt_length={self.options.prompt_length} is too short: the prompt of {name} has "
                f"{lengths[name]} tokens; give at least as many, or shorten its caption"
            )

    def train_source(self) -> grain.MapDataset:
        """Returns the training images with their prompts."""
        return grain.MapDataset.source(self.images.train).map(self._example)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of the first ``eval_examples`` images of the held-out split."""
        return self.images.held_out_batches(batch_size, self._example)

    def sample_callback(self, mesh: Mesh) -> Callable[[ImageModel], SampleImages]:
        """Returns a function that generates images from twelve held-out prompts, with the same seeds at each call."""
        batch = next(self.eval_batches(12))

        def draw_samples(model: ImageModel) -> SampleImages:
            images = draw(
                model, mesh, batch["prompt_ids"], batch["prompt_mask"], self.config.seed,
                cfg_scale=self.options.cfg_scale,
            )  # fmt: skip
            return {"samples": grids.grid(np.concatenate([batch["image"], images]), columns=len(images), scale=2)}

        return draw_samples

    def export(self, model: ImageModel, directory: Path, run: dict[str, Any]) -> None:
        """Writes the complete model as a folder, with its language model in bfloat16.

        The held-out metrics in its manifest are those of the written model.
        """
        save_model(model, directory, "bfloat16")
        model = load_model(directory, mesh=mesh_of_export(self.config))
        self.text.save(directory)
        batches = list(self.eval_batches(rows_of_a_device(self.config)))
        figures = {"valid_bits_per_code": mean_bits(self, model, batches), **tokenizer_figures(model, batches)}
        write_manifest(directory, model, run | {"tokenizer": made_by(self.options.tokenizer)}, **figures)


def _captions(images: ReadableImages) -> Iterator[tuple[str, str]]:
    """Yields ids and captions of images, without images that are known to be unreadable."""
    for number in range(len(images)):
        with contextlib.suppress(BadImage):
            yield images.images.source_id(number), images.images.caption(number)
