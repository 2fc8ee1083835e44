"""What the tasks have in common: presets, held-out batches, figures of a tokenizer, the manifest of an export."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from arrag_jax.config import TrainConfig
from arrag_jax.data.emoji.dataset import load_source
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Backbone, ImageTokenizer
from arrag_jax.json_files import read_object
from arrag_jax.mesh import make_mesh
from arrag_jax.models import manifest
from arrag_jax.models.registry import trained_presets
from arrag_jax.models.tensor_files import checkpoint_folder
from arrag_jax.nn.vq import from_uint8
from arrag_jax.training.loop import Batch, Task, mean_over_examples

BITS = 1 / math.log(2)  # in a nat


def check_preset(name: str) -> None:
    """Raises UserError unless a model's shape goes by this name."""
    if name not in trained_presets():
        raise UserError(f"preset={name!r} is unknown; choose one of {', '.join(trained_presets())}")


def held_out(config: TrainConfig, batch_size: int, example: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Batches of the first ``eval_examples`` examples of the held-out split."""
    data = config.data
    source = load_source(data.name, f"{data.eval_split}[:{data.eval_examples}]", data.data_dir)
    return in_batches(source, len(source), batch_size, example)


def rows_of_a_device(config: TrainConfig) -> int:
    """Examples that one device has at once in training: what its memory is known to hold."""
    return max(1, config.batch_size // (config.accumulate * make_mesh(config.mesh).size))


def in_batches(source: Any, count: int, batch_size: int, example: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Batches of what ``example`` makes of the first ``count`` of a source; the last may be smaller."""
    for start in range(0, count, batch_size):
        rows = [example(source[i]) for i in range(start, min(start + batch_size, count))]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


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
