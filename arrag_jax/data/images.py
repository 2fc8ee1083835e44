"""Images that go through a model's tokenizer: what the commands that encode a source share."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from arrag_jax.config import DatastoreConfig
from arrag_jax.data import sources
from arrag_jax.data.emoji_scenes import NAMES, load_source
from arrag_jax.data.prepared import PREFIX, PreparedImages
from arrag_jax.errors import UserError
from arrag_jax.models.janus import Janus, encode_split
from arrag_jax.nn.vq import from_uint8
from arrag_jax.retrieval.encoding import Encode, Examples

LISTING = ".listing.jsonl"  # in the folder of an unfinished store: the images as they were when it was begun


class DataSetImages:
    """Some images of a split as a random-access source of examples (``retrieval.encoding.Examples``).

    Args:
      examples: of the whole split.
      name: of the split, "emoji_scenes/full/store".
      known: ids ("emoji_scenes/full/store/17") to leave out.
    """

    def __init__(self, examples: Examples, name: str, known: Collection[str] = ()):
        self.examples, self.name = examples, name
        self.numbers = [number for number in range(len(examples)) if f"{name}/{number}" not in known]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[self.numbers[index]]

    def source_id(self, index: int) -> str:
        """The id of an image."""
        return f"{self.name}/{self.numbers[index]}"


def load_images(source: str, split: str, data_dir: str | Path, tokenizer: Janus) -> Sequence[dict[str, Any]]:
    """Random-access source of a split whose images the tokenizer's grid covers exactly.

    Args: as ``load_source``.

    Raises:
      UserError: unknown source or split, or images of another size.
    """
    examples = load_source(source, split, data_dir)
    if len(examples) == 0:
        raise UserError(f"split {split} of {source} is empty; choose another")
    found, wanted = examples[0]["image"].shape, (*tokenizer.config.image_size, 3)
    if found != wanted:
        raise UserError(f"images of {source} are {found}, the model's tokenizer takes {wanted}; use another model")
    return examples


def is_data_set(source: str) -> bool:
    """Is it a TFDS data set, with splits, rather than a folder or a tar?"""
    return source in NAMES or source.startswith(PREFIX)


def images_to_store(
    config: DatastoreConfig, tokenizer: Janus, state: str, directory: Path, known: Collection[str] = ()
) -> DataSetImages | sources.FileImages:
    """The images of a store that is to be built, none of one that is whole.

    A folder is listed when its store is begun, and the list kept in ``LISTING`` until the store is whole: what is
    added to the folder meanwhile is not taken, what is taken away or changed is a bad image.

    Args:
      config: tells the source.
      tokenizer: tells the size.
      state: of the store, "nothing", "begun" or "whole".
      directory: of the store.
      known: ids of images to leave out.

    Raises:
      UserError: the source is not there, has no captions where the config wants some, or does not fit the tokenizer.
    """
    if is_data_set(config.source):
        where, size = (config.source, config.split, config.data_dir), tokenizer.config.image_size
        if state == "whole":
            examples: Examples = []
        elif config.source in NAMES:
            examples = load_images(*where, tokenizer)
        else:
            examples = PreparedImages(*where, size, config.captions)
        return DataSetImages(examples, f"{config.source}/{config.split}", known)
    entries, listing = [], directory / LISTING
    if state == "nothing":
        entries = [entry for entry in sources.list_images(config.source, config.captions) if entry.id not in known]
        if entries:
            directory.mkdir(parents=True, exist_ok=True)
            sources.save_listing(listing, entries)
    elif state == "begun":
        entries = sources.load_listing(listing)
    return sources.FileImages(sources.root_of(config.source), entries, tokenizer.config.image_size)


def encoder(tokenizer: Janus) -> Encode:
    """Codes and latents of uint8 images by this tokenizer, one batch after another on each local device in turn.

    A batch is encoded by one device, so that its codes are the same on any number of them.
    """
    graph, state = nnx.split(tokenizer.gen_vision_model)  # once: it takes a tenth of a small tokenizer's time
    turns = itertools.cycle([(device, jax.device_put(state, device)) for device in jax.local_devices()])

    def encode(images: np.ndarray) -> tuple[Any, Any]:
        device, copy = next(turns)
        return encode_split(graph, copy, from_uint8(jax.device_put(images, device)))

    return encode
