"""From a source's name to its images: one table of data sets, and folders, tars and prepared sets beside them.

Stores, neighbour sets and training open their images here. A new data set is one file below ``data/`` and one line of
``DATA_SETS``.
"""

import functools
import hashlib
import json
from pathlib import Path

from tensorflow_datasets.core.splits import SplitInfo

from arrag_jax.data import sources
from arrag_jax.data.emoji import dataset as emoji
from arrag_jax.data.examples import Images, Source
from arrag_jax.data.prepared import PREFIX, PreparedSource, places
from arrag_jax.errors import UserError

# Names of the data sets that this package builds itself → what makes a ``Source`` of (name, data_dir, size, captions).
DATA_SETS = {
    **dict.fromkeys(emoji.NAMES, emoji.SceneSource),
}


def is_data_set(source: str) -> bool:
    """Tells whether this is a TFDS data set, which has splits, rather than a folder or a tar."""
    return source in DATA_SETS or source.startswith(PREFIX)


def open_source(
    source: str, data_dir: str | Path, size: tuple[int, int], captions: bool = False, key: str = "config.source"
) -> Source:
    """Returns the images that a source holds.

    Args:
      source: a name in ``DATA_SETS``, "tfds:NAME[/config][:version]" (any set that TFDS has prepared as ArrayRecord
        files), a folder of images and tars, or one .tar.
      data_dir: where TFDS keeps data sets.
      size: height and width of the images in pixels; photos are scaled and cropped to it (``data.pixels``).
      captions: read the captions, too. Those of a folder or a tar are files beside the images (``data.sidecars``).

      key: how errors call the source.

    Raises:
      UserError: the source is not there, or has no captions where they are asked for. Splits are opened later.
    """
    if source in DATA_SETS:
        return DATA_SETS[source](source, data_dir, size, captions)
    if source.startswith(PREFIX):
        return PreparedSource(source, data_dir, size, captions, key)
    families = {name.partition("/")[0] for name in DATA_SETS}
    if source.partition("/")[0] in families and not Path(source).exists():
        raise UserError(f"unknown data set {source!r}; take one of {', '.join(DATA_SETS)}")
    return FileSource(source, size, captions, key)


def open_images(source: str, split: str, data_dir: str | Path, size: tuple[int, int], captions: bool = False) -> Images:
    """Returns the images of one split of a source.

    Args:
      split: of a data set, or a TFDS slice of one ("train[:100]"). The images of a folder or a tar, in the order of
        their paths, are one split, "train", which is sliced alike ("" = all of it).

    Raises:
      UserError: as ``open_source``; no such split, or an empty one.
    """
    return open_source(source, data_dir, size, captions).images(split)


class FileSource:
    """A folder or a tar as an image source (``data.examples.Source``), listed once."""

    words = None

    def __init__(self, source: str, size: tuple[int, int], captions: bool = False, key: str = "config.source"):
        self._source, self._size = source, size
        self._entries = sources.list_source(source, captions, key).entries

    @functools.cached_property
    def identity(self) -> str:
        """Sixteen hex digits of a hash over the images' ids, sizes in bytes and captions."""
        content = hashlib.sha256()
        for entry in self._entries:
            content.update(json.dumps((entry.id, entry.size, entry.caption, entry.is_passed_over)).encode())
        return content.hexdigest()[:16]

    def images(self, split: str) -> sources.FileImages:
        """Returns the images of a slice; what is passed over is left out after slicing, as neighbour sets do it."""
        entries = [x for x in entries_of_split(self._source, self._entries, split) if not x.is_passed_over]
        if not entries:
            raise UserError(f"{self._source} has no image in {split}; choose another slice")
        return sources.FileImages(sources.root_of(self._source), entries, self._size)


def entries_of_split(source: str, entries: list[sources.Entry], split: str) -> list[sources.Entry]:
    """Returns those of a source's files that stand in a slice of "train", which is all of them ("": all).

    Raises:
      UserError: no such split, or an empty one.
    """
    number = len(entries)
    try:
        whole = SplitInfo(name="train", shard_lengths=[number], num_bytes=0)
        found = [entries[i] for _, i in places(split or "train", {"train": whole})]
        if not found:
            raise ValueError("it is empty")
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        held = f'its {number:,} images are one split, "train", to take slices of, as "train[:-64]" and "train[-64:]"'
        raise UserError(f"{source} has no {split}: {held} ({reason})") from error
    return found
