"""What the tasks have in common: held-out batches, figures of a tokenizer, the manifest of an export."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.config import DataConfig, TrainConfig
from arrag_jax.data.examples import BadImage, Images, Subset
from arrag_jax.data.readable import ReadableImages
from arrag_jax.data.registry import open_source
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Backbone, ImageTokenizer
from arrag_jax.json_files import read_object
from arrag_jax.mesh import make_mesh
from arrag_jax.models import manifest
from arrag_jax.models.tensor_files import checkpoint_folder
from arrag_jax.nn.vq import from_uint8
from arrag_jax.progress import tell
from arrag_jax.training.loop import Batch, Task, mean_over_examples

BITS = 1 / math.log(2)  # in a nat


class RunImages:
    """The images that a run learns from and is judged on; each split is opened when it is asked for first.

    Args:
      data: which ones.
      size: height and width in pixels.
      is_prompt: tells of a caption whether it can be a prompt; an image without one is left out. None = captions are
        not read. Sources that know their words have a prompt for every image.
    """

    def __init__(self, data: DataConfig, size: tuple[int, int], is_prompt: Callable[[str], bool] | None = None):
        self._data, self._is_prompt = data, is_prompt
        self.source = open_source(data.source, data.data_dir, size, is_prompt is not None, "config.data.source")

    def require_splits(self) -> None:
        """Raises UserError unless both splits are there. A set that is built on demand is not looked at."""
        if self.source.identity:
            _ = self.train, self.held_out

    @functools.cached_property
    def train(self) -> ReadableImages:
        """The images of the training split."""
        return self._open(self._data.train_split)

    @functools.cached_property
    def held_out(self) -> ReadableImages:
        """The images of the held-out split."""
        return self._open(self._data.eval_split)

    def held_out_batches(self, batch_size: int, example: Callable[[Any], Batch]) -> Iterator[Batch]:
        """Yields batches of what ``example`` makes of the readable ones among the first ``eval_examples`` images."""
        count, found = self._data.eval_examples, 0
        readable = self.held_out.first(count)
        while rows := [example(each) for each in itertools.islice(readable, batch_size)]:
            found += len(rows)
            yield stacked(rows)
        if not found:
            raise UserError(f"none of the first {count:,} held-out images can be read; raise config.data.eval_examples")

    def identity(self) -> dict[str, str]:
        """What ``Task.base`` says of the images, lest a run be continued on others; {} where their name tells that."""
        return {"data": self.source.identity} if self.source.identity else {}

    def _open(self, split: str) -> ReadableImages:
        images = self.source.images(split)
        if self._is_prompt is not None and self.source.words is None:
            numbers = [number for number in range(len(images)) if self._is_taken(images, number)]
            where, left_out = f"{split} of {self._data.source}", len(images) - len(numbers)
            if not numbers:
                raise UserError(f"no image in {where} has a caption that can be a prompt; choose another slice")
            if left_out and jax.process_index() == 0:
                tell(f"{left_out:,} of the {len(images):,} images in {where} have no caption and are left out")
            images = Subset(images, numbers)
        return ReadableImages(images, self._data.max_bad_fraction, self._data.min_bad)

    def _is_taken(self, images: Images, number: int) -> bool:
        """Whether an image has a prompt, or is a bad one, which whoever reads it counts."""
        try:
            return self._is_prompt is None or self._is_prompt(images.caption(number))
        except BadImage:
            return True


def rows_of_a_device(config: TrainConfig) -> int:
    """Examples that one device has at once in training: what its memory is known to hold."""
    return max(1, config.batch_size // (config.accumulate * make_mesh(config.mesh).size))


def in_batches(source: Any, count: int, batch_size: int, example: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Batches of what ``example`` makes of the first ``count`` of a source; the last may be smaller."""
    for start in range(0, count, batch_size):
        yield stacked([example(source[i]) for i in range(start, min(start + batch_size, count))])


def stacked(rows: Sequence[Batch]) -> Batch:
    """A batch of examples."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def mean_bits(task: Task, model: Backbone, batches: Iterable[Batch]) -> float:
    """A task's held-out bits a code, over all examples."""
    graph, state = nnx.split(model)
    metrics_of = jax.jit(lambda state, batch: task.eval_metrics(nnx.merge(graph, state), batch))
    return mean_over_examples(functools.partial(metrics_of, state), batches)["bits_per_code"]


def psnr(decoded: Float[Array, "B h w 3"], images: Float[Array, "B h w 3"]) -> Float[Array, ""]:
    """Mean peak signal-to-noise ratio, in dB, of pictures in [-1, 1] decoded from codes."""
    error = jnp.mean((decoded - images) ** 2, axis=(1, 2, 3))
    return jnp.mean(10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10)))


def tokenizer_figures(model: ImageTokenizer, batches: Iterable[Batch]) -> dict[str, float]:
    """PSNR in dB, and the share of codes that occur, over batches of held-out images."""
    used, total, count = np.zeros(model.codebook_size, bool), 0.0, 0
    for batch in batches:
        images = from_uint8(batch["image"])
        codes, latents = model.encode_images(images)
        used[np.unique(codes)] = True
        total += float(psnr(model.decode_codes(codes, *latents.shape[1:3]), images)) * len(images)
        count += len(images)
    return {"psnr_db": total / count, "codes_used": float(used.mean())}


def made_by(folder: str) -> dict[str, Any]:
    """What a model folder's own manifest says of its training; {} where it has none."""
    path = checkpoint_folder(Path(folder)) / manifest.MANIFEST
    content = read_object(path) if path.is_file() else {}
    return {key: content[key] for key in ("command", "training_minutes", "hardware", "config") if key in content}


def write_manifest(directory: Path, model: ImageTokenizer, run: dict[str, Any], **figures: float) -> None:
    """``manifest.json``: what a checkpoint reached, where it comes from, and the hashes of its files."""
    content = {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "tokenizer_fingerprint": model.fingerprint,
        **run,
    }
    manifest.write_manifest(directory, content)
