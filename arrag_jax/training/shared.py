"""Code that several tasks share: held-out batches, metrics of a tokenizer, and the manifest of an export."""

import dataclasses
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
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from arrag_jax.config import DataConfig, MeshConfig, RetrievalConfig, TrainConfig
from arrag_jax.data.examples import BadImage, Images, Subset
from arrag_jax.data.readable import ReadableImages
from arrag_jax.data.registry import open_source
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Backbone, ImageTokenizer
from arrag_jax.json_files import read_object
from arrag_jax.mesh import make_mesh, on_own_device
from arrag_jax.models import card, manifest
from arrag_jax.models.lookup import LookupModel
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.vq_images import with_whole_tokenizer
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.progress import tell
from arrag_jax.training.loop import mean_over_examples
from arrag_jax.training.task import Batch, Task

BITS = 1 / math.log(2)  # bits per nat


class RunImages:
    """The images for training and evaluation of a run; each split is opened at its first use.

    Args:
      data: the source and its splits.
      size: height and width in pixels.
      is_prompt: says whether a caption can be a prompt; an image without such a caption is left out. None = captions
        are not read. In sources that declare their words, every image has a prompt.
    """

    def __init__(self, data: DataConfig, size: tuple[int, int], is_prompt: Callable[[str], bool] | None = None):
        self._data, self._is_prompt = data, is_prompt
        self.source = open_source(
            data.source, data.data_dir, size, is_prompt is not None, "config.data.source", data.columns
        )

    def require_splits(self) -> None:
        """Raises UserError unless both splits exist. A data set that is built on demand is not checked."""
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
        """Yields batches of ``example(image)`` for the readable images among the first ``eval_examples``.

        Raises:
          UserError: if none of them can be read.
        """
        count, found = self._data.eval_examples, 0
        readable = self.held_out.first(count)
        while rows := [example(each) for each in itertools.islice(readable, batch_size)]:
            found += len(rows)
            yield stacked(rows)
        if not found:
            raise UserError(f"none of the first {count:,} held-out images can be read; raise config.data.eval_examples")

    def identity(self) -> dict[str, str]:
        """Returns the identity of the images for ``Task.base``, so that a run is not continued on other images.

        Returns {} if the name of the source already identifies them.
        """
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
        """Returns whether an image has a prompt; True for an unreadable image, because its reader counts it later."""
        try:
            return self._is_prompt is None or self._is_prompt(images.caption(number))
        except BadImage:
            return True


def split_over(mesh: Mesh) -> Mesh | None:
    """Returns the mesh if it splits parameters; None if every device holds the whole model."""
    return mesh if mesh.shape["fsdp"] > 1 else None


def search_over(config: RetrievalConfig, mesh: Mesh) -> RetrievalConfig:
    """Returns the settings of the search of sample images over a mesh.

    If parameters are split, so is the store, and a ScaNN index would need as many shards; the search is then dense.
    """
    return config if split_over(mesh) is None else dataclasses.replace(config, search="dense")


def draw(
    model: Any,
    mesh: Mesh,
    ids: Any,
    mask: Any,
    seed: int,
    policy: Any = None,
    retriever: Any = None,
    base: Any = None,
    **settings: Any,
) -> UInt8[np.ndarray, "N h w 3"]:
    """Returns one image per prompt, drawn with a model that lies on the mesh; arguments as in ``sample``.

    One device of each process draws if it holds the whole model, else all devices draw together.

    Args:
      base: the model whose states are searched, if the policy blends; None = the model itself.
    """
    split, rows = split_over(mesh), np.arange(len(ids))
    if split is None:
        graph, state = nnx.split(model)
        model = nnx.merge(graph, on_own_device(state, mesh))
    else:
        rows = np.resize(rows, -(-len(ids) // mesh.shape["data"]) * mesh.shape["data"])
        model = with_whole_tokenizer(model, mesh)
    blends = base is not None and policy is not None and policy.blends
    drawer: Any = LookupModel(model, base) if blends else model
    drawn = sample(drawer, ids[rows], policy, retriever, seed=seed, prompt_mask=mask[rows], mesh=split, **settings)
    return np.asarray(to_uint8(model.decode_codes(np.asarray(drawn.codes)[: len(ids)], *model.grid)))


def mesh_of_export(config: TrainConfig) -> Mesh | None:
    """Returns this process's devices as a mesh for the model that it has exported; None if one device is enough."""
    ways = math.gcd(make_mesh(config.mesh).shape["fsdp"], jax.local_device_count())
    return make_mesh(MeshConfig(1, ways), alone=True) if ways > 1 else None


def rows_of_a_device(config: TrainConfig) -> int:
    """Returns how many examples one device holds at once in training, because these are known to fit its memory."""
    return max(1, config.batch_size // (config.accumulate * make_mesh(config.mesh).size))


def in_batches(source: Any, count: int, batch_size: int, example: Callable[[Any], Batch]) -> Iterator[Batch]:
    """Yields batches of ``example(source[i])`` for the first ``count`` examples; the last batch may be smaller."""
    for start in range(0, count, batch_size):
        yield stacked([example(source[i]) for i in range(start, min(start + batch_size, count))])


def stacked(rows: Sequence[Batch]) -> Batch:
    """Returns the batch that stacks the examples."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def mean_bits(task: Task, model: Backbone, batches: Iterable[Batch]) -> float:
    """Returns a task's held-out bits per code, the mean over all examples."""
    graph, state = nnx.split(model)
    metrics_of = jax.jit(lambda state, batch: task.eval_metrics(nnx.merge(graph, state), batch))
    return mean_over_examples(functools.partial(metrics_of, state), batches)["bits_per_code"]


def psnr(decoded: Float[Array, "B h w 3"], images: Float[Array, "B h w 3"]) -> Float[Array, ""]:
    """Returns the mean peak signal-to-noise ratio, in dB, of decoded images; both arguments are in [-1, 1]."""
    error = jnp.mean((decoded - images) ** 2, axis=(1, 2, 3))
    return jnp.mean(10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10)))


def tokenizer_figures(model: ImageTokenizer, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns the PSNR in dB and the share of codes that occur, over batches of held-out images."""
    used, total, count = np.zeros(model.codebook_size, bool), 0.0, 0
    for batch in batches:
        images = from_uint8(batch["image"])
        codes, latents = model.encode_images(images)
        used[np.unique(codes)] = True
        total += float(psnr(model.decode_codes(codes, *latents.shape[1:3]), images)) * len(images)
        count += len(images)
    return {"psnr_db": total / count, "codes_used": float(used.mean())}


def made_by(folder: str) -> dict[str, Any]:
    """Returns what a model folder's own manifest says about its training; {} if it has no manifest."""
    path = checkpoint_folder(Path(folder)) / manifest.MANIFEST
    content = read_object(path) if path.is_file() else {}
    return {key: content[key] for key in ("command", "training_minutes", "hardware", "config") if key in content}


def write_manifest(directory: Path, model: ImageTokenizer, run: dict[str, Any], **figures: float) -> None:
    """Writes ``manifest.json`` (metrics, origin, hashes of the files) and the model card of an export."""
    content = {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "tokenizer_fingerprint": model.fingerprint,
        **run,
    }
    manifest.write_manifest(directory, content)
    card.write_card(directory, content)
