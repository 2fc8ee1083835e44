"""Opens image sources and encodes images with a tokenizer; shared by all commands that encode images."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from arrag_jax import huggingface, object_storage, remote
from arrag_jax.config import BY_HABIT, ColumnsConfig
from arrag_jax.data import endings, sources
from arrag_jax.data.duplicates import without_copies
from arrag_jax.data.entries import Entry, load_whole_listing, save_listing
from arrag_jax.data.examples import PASSED_OVER, Images, Subset
from arrag_jax.data.hub_sets import files_of
from arrag_jax.data.registry import entries_of_split, is_data_set, open_images
from arrag_jax.data.stated_rights import LICENCE, SOURCE, rights_of
from arrag_jax.errors import UserError
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.nn.vq import from_uint8, to_uint8
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.encoding import Encode
from arrag_jax.store.shards import ShardFolder, ShardSettings

LISTING = ".listing.jsonl"  # in the folder of an unfinished build: the images as they were when the build started


class ImageSource:
    """An image source of a command: a data set, a folder or a tar.

    A folder or tar is listed when the build starts, and the list is kept until the build is complete. Images that are
    added to the folder during the build are ignored; images that are removed or changed count as bad images.

    Args:
      name: as in ``DatastoreConfig.source``.
      data_dir: where TFDS keeps data sets.
      captions: whether the images must have captions.
      tokenizer: sets the size of the images.
      state: state of the build: "nothing", "begun" or "whole". A complete ("whole") build reads no images.
      listing: path of the file that keeps the list.
      copies: take all files of equal bytes (and caption); if False, only the first of them.
      columns: the columns of Parquet files.
      rights: whether licences and sources are read.

    Attributes:
      beside: ending → number of listed files with that ending that hold no image.

    Raises:
      UserError: if the source does not exist, or has no captions although they are required.
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
        columns: ColumnsConfig = BY_HABIT,
        rights: bool = False,
    ):
        self.rights = rights
        self.name, self.data_dir, self.captions, self.tokenizer = name, data_dir, captions, tokenizer
        self.state, self.listing = state, listing
        self.entries: list[Entry] = []
        self.beside: dict[str, int] = {}
        if state == "begun" and not is_data_set(name):
            self.entries, self.beside = load_whole_listing(listing)
            if huggingface.is_id(name):  # this machine may not have them, or not any more
                files_of(name)
            elif object_storage.is_address(name):
                object_storage.copied(name, "source")
        elif state == "nothing" and not is_data_set(name):
            self.entries, self.beside = sources.list_source(name, captions, columns=columns, rights=rights)
            if not copies:
                self.entries = without_copies(sources.root_of(name), self.entries)

    def images(self, split: str = "", known: Collection[str] = (), passed_over: Collection[str] = ()) -> Images:
        """Returns the images of a split.

        Args:
          split: a split of a data set. For files, a slice of "train", which holds all of them; "" = all.
          known: names (``names_below``) of images to leave out.
          passed_over: names of images to leave out if they are still passed over.

        Raises:
          UserError: if there is no such split, it is empty, or its images do not fit the tokenizer.
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
        if self.rights and not any(rights_of(dict.fromkeys(images[0], "stated"))):
            raise UserError(
                f"config.source={self.name} has no feature with a licence or a source "
                f"({', '.join((*LICENCE, *SOURCE))}); leave config.rights out"
            )
        return Subset(images, [i for i in range(len(images)) if images.source_id(i) not in known])

    def keep_listing(self) -> None:
        """Writes the list to its file if a build of files is about to start."""
        if self.state == "nothing" and self.entries:
            self.listing.parent.mkdir(parents=True, exist_ok=True)
            save_listing(self.listing, self.entries, self.beside)


def origin_of(source: str) -> str:
    """Returns the absolute path of a folder or file, with links resolved; "" for a data set, an id or an address."""
    return "" if is_data_set(source) or remote.is_remote(source) else str(Path(source).resolve())


def is_same_source(settings: ShardSettings, source: str) -> bool:
    """Returns whether these settings describe the same source, however its path is spelt."""
    if settings.origin and not is_data_set(source):
        return settings.origin == origin_of(source)
    return sources.spelt_alike(source, [settings.source]) == settings.source


def names_below(source: str) -> Callable[[str], str]:
    """Returns a function from the id of an image of this source to a name that is unique across sources.

    The name of a data set's image is its id. The name of a file is the absolute path of the source's root and then the
    id, so that a file has the same name in every source that contains it. A file of the hub has the same name in all
    commits of its repository.
    """
    if huggingface.is_id(source):
        return lambda id_: f"{huggingface.parse_id(source, 'source').repository}/{id_}"
    if object_storage.is_address(source):
        root = source.rpartition("/")[0] if source.lower().endswith(sources.SINGLE) else source
        return lambda id_: f"{root}/{id_}"
    below = "" if is_data_set(source) else f"{sources.root_of(source).resolve()}/"
    return lambda id_: f"{below}{id_}"


def names_in(store: Datastore) -> list[str]:
    """Returns the names (``names_below``) of a store's images, in order."""
    name_of = itertools.chain.from_iterable(
        itertools.repeat(names_below(x.settings.found_in), x.num_images) for x in store.wholes
    )
    return [name(id_) for name, id_ in zip(name_of, store.sources, strict=False)]  # a subset has fewer sources


def names_left_out(store: Datastore) -> list[tuple[str, str]]:
    """Returns (name, reason) for each image that a store left out."""
    found = []
    for part in store.wholes:
        name_of = names_below(part.settings.found_in)
        found += [(name_of(id_), reason) for id_, reason in part.bad]
    return found


def told_of(folders: Sequence[ShardFolder], bad: str, duplicates: int = 0) -> str:
    """Returns the part of a command's last line that counts files without an image; "" if there are none.

    Args:
      folders: the segments of one store, or one other folder. Where several have the same source, the counts of
        files that are not images come from the last one, because it was listed last.
      bad: the noun for images that cannot be read.
      duplicates: the number of duplicates left out.
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
    """Returns the counts per file ending as text, the most frequent first."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))


def encoder(tokenizer: ImageTokenizer) -> Encode:
    """Returns a function that encodes a batch of uint8 images to codes and latents; it uses the local devices in turn.

    One device encodes a whole batch, so that the codes do not depend on the number of devices.
    """
    graph, state = nnx.split(tokenizer)  # only once, because it takes a tenth of a small tokenizer's encoding time
    turns = itertools.cycle([(device, jax.device_put(state, device)) for device in jax.local_devices()])

    def encode(images: np.ndarray) -> tuple[Any, Any]:
        device, copy = next(turns)
        return encode_compiled(graph, copy, from_uint8(jax.device_put(images, device)))

    return encode


@jax.jit(static_argnums=0)
def encode_compiled(graph, state, images):
    """Returns codes [B, H, W] and latents of float images."""
    codes, latents = nnx.merge(graph, state).encode_images(images)
    return codes.reshape(latents.shape[:3]), latents


def reconstruct(model: ImageTokenizer, images: UInt8[np.ndarray, "N h w 3"]) -> UInt8[np.ndarray, "N h w 3"]:
    """Returns the images encoded and decoded by the tokenizer, 100 images per batch.

    This is the upper bound of image quality that a grid of codes can reach.
    """
    parts = []
    for start in range(0, len(images), 100):
        codes, latents = model.encode_images(from_uint8(images[start : start + 100]))
        parts.append(np.asarray(to_uint8(model.decode_codes(codes, *latents.shape[1:3]))))
    return np.concatenate(parts)
