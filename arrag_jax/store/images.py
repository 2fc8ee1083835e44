"""Images that go through a model's tokenizer: what the commands that encode a source share."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from arrag_jax.data import endings, sources
from arrag_jax.data.duplicates import without_copies
from arrag_jax.data.examples import PASSED_OVER, Images, Subset
from arrag_jax.data.registry import entries_of_split, is_data_set, open_images
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.encoding import Encode
from arrag_jax.store.shards import ShardFolder, ShardSettings

LISTING = ".listing.jsonl"  # in the folder of an unfinished build: the images as they were when it was begun


class ImageSource:
    """Where a command takes its images from: a data set, a folder or a tar.

    A folder is listed when what is made of it is begun, and the list kept until that is whole: what is added to the
    folder meanwhile is not taken, what is taken away or changed is a bad image.

    Args:
      name: as ``DatastoreConfig.source``.
      data_dir: where TFDS keeps data sets.
      captions: must it have captions?
      tokenizer: tells the size.
      state: of what is made of the images, "nothing", "begun" or "whole"; what is whole needs none.
      listing: file for the list.
      copies: take files of equal bytes (and caption) all; else the first one alone.

    Attributes:
      beside: how many files of each ending hold no image, as listed.

    Raises:
      UserError: the source is not there, or has no captions where they are asked for.
    """

    def __init__(
        self,
        name: str,
        data_dir: str,
        captions: bool,
        tokenizer: ImageTokenizer,
        state: str,
        listing: Path,
        copies: bool = True,
    ):
        self.name, self.data_dir, self.captions, self.tokenizer = name, data_dir, captions, tokenizer
        self.state, self.listing = state, listing
        self.entries: list[sources.Entry] = []
        self.beside: dict[str, int] = {}
        if state == "begun" and not is_data_set(name):
            self.entries, self.beside = sources.load_whole_listing(listing)
        elif state == "nothing" and not is_data_set(name):
            self.entries, self.beside = sources.list_source(name, captions)
            if not copies:
                self.entries = without_copies(sources.root_of(name), self.entries)

    def images(self, split: str = "", known: Collection[str] = (), passed_over: Collection[str] = ()) -> Images:
        """The images of a split.

        Args:
          split: of a data set; of the files a slice of "train", which are all of them ("": all).
          known: names (``names_below``) of images to leave out.
          passed_over: names to leave out of those that are passed over still.

        Raises:
          UserError: no such split, an empty one, or images that do not fit the tokenizer.
        """
        size = self.tokenizer.image_size
        if self.state == "whole":
            return sources.FileImages(Path(), [], size)
        if not is_data_set(self.name):
            name_of = names_below(self.name)
            entries = entries_of_split(self.name, self.entries, split)
            entries = [entry for entry in entries if name_of(entry.id) not in known]
            entries = [x for x in entries if not x.is_passed_over or name_of(x.id) not in passed_over]
            return sources.FileImages(sources.root_of(self.name), entries, size)
        images = open_images(self.name, split, self.data_dir, size, self.captions)
        return Subset(images, [i for i in range(len(images)) if images.source_id(i) not in known])

    def keep_listing(self) -> None:
        """Writes the list, if there is one to begin with."""
        if self.state == "nothing" and self.entries:
            self.listing.parent.mkdir(parents=True, exist_ok=True)
            sources.save_listing(self.listing, self.entries, self.beside)


def origin_of(source: str) -> str:
    """The whole path of a folder or tar, without links; "" of a data set."""
    return "" if is_data_set(source) else str(Path(source).resolve())


def is_same_source(settings: ShardSettings, source: str) -> bool:
    """Whether what these settings describe was made of this source, however it is spelled and from wherever."""
    if settings.origin and not is_data_set(source):
        return settings.origin == origin_of(source)
    return sources.spelt_alike(source, [settings.source]) == settings.source


def names_below(source: str) -> Callable[[str], str]:
    """From the id of an image of this source to a name that no other image has, by whatever source it is found.

    A data set's ids are such names; a file's path below the source becomes its whole path.
    """
    below = "" if is_data_set(source) else f"{sources.root_of(source).resolve()}/"
    return lambda id_: f"{below}{id_}"


def names_in(store: Datastore) -> list[str]:
    """The names of a store's images, in order."""
    name_of = itertools.chain.from_iterable(
        itertools.repeat(names_below(x.settings.found_in), x.num_images) for x in store.wholes
    )
    return [name(id_) for name, id_ in zip(name_of, store.sources, strict=False)]  # of a subset the first alone


def names_left_out(store: Datastore) -> list[tuple[str, str]]:
    """The name of each image that a store left out, and why."""
    found = []
    for part in store.wholes:
        name_of = names_below(part.settings.found_in)
        found += [(name_of(id_), reason) for id_, reason in part.bad]
    return found


def told_of(folders: Sequence[ShardFolder], bad: str, duplicates: int = 0) -> str:
    """What a closing line says of the files that gave no image; "" if there are none.

    Args:
      folders: of one thing; those of one source were listed one after another, so that the last one counts what lies
        beside the images.
      bad: what to call those that cannot be read.
      duplicates: how many were left out.
    """
    number = sum(folder.num_bad for folder in folders)
    passed = [id_ for folder in folders for id_, reason in folder.bad if reason.startswith(PASSED_OVER)]
    beside = {x.settings.found_in: x.settings.beside for x in folders}
    counts: Counter[str] = Counter()
    for found in beside.values():
        counts.update(found)
    words = [
        f"{number:,} {bad} are left out" if number else "",
        f"{duplicates:,} duplicates are left out" if duplicates else "",
        f"passed over, see bad-*.txt: {_counted(Counter(map(endings.ending, passed)))}" if passed else "",
        f"not images: {_counted(counts)}" if counts else "",
    ]
    return f" ({'; '.join(filter(None, words))})" if any(words) else ""


def _counted(counts: Mapping[str, int]) -> str:
    """Counts by ending, the most frequent first."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))


def encoder(tokenizer: ImageTokenizer) -> Encode:
    """Codes and latents of uint8 images by this tokenizer, one batch after another on each local device in turn.

    A batch is encoded by one device, so that its codes are the same on any number of them.
    """
    graph, state = nnx.split(tokenizer)  # once: it takes a tenth of a small tokenizer's time
    turns = itertools.cycle([(device, jax.device_put(state, device)) for device in jax.local_devices()])

    def encode(images: np.ndarray) -> tuple[Any, Any]:
        device, copy = next(turns)
        return _encode(graph, copy, from_uint8(jax.device_put(images, device)))

    return encode


@jax.jit(static_argnums=0)
def _encode(graph, state, images):
    codes, latents = nnx.merge(graph, state).encode_images(images)
    return codes.reshape(latents.shape[:3]), latents


def reconstruct(model: ImageTokenizer, images: UInt8[np.ndarray, "N h w 3"]) -> UInt8[np.ndarray, "N h w 3"]:
    """Images through the tokenizer and back, a hundred at a time: the best that codes can look."""
    parts = []
    for start in range(0, len(images), 100):
        codes, latents = model.encode_images(from_uint8(images[start : start + 100]))
        parts.append(np.asarray(to_uint8(model.decode_codes(codes, *latents.shape[1:3]))))
    return np.concatenate(parts)
