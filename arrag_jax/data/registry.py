"""Opens an image source by its name: a data set in ``DATA_SETS``, a folder, a tar, or a data set prepared by TFDS.

Datastores, neighbour sets and training open their images here. A new data set needs one file below ``data/`` and one
line in ``DATA_SETS``.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from tensorflow_datasets.core.splits import SplitInfo

from arrag_jax import huggingface
from arrag_jax.config import BY_HABIT, ColumnsConfig
from arrag_jax.data import hub_sets, sources
from arrag_jax.data.emoji import dataset as emoji
from arrag_jax.data.examples import Images, Source
from arrag_jax.data.prepared import PREFIX, PreparedSource, places
from arrag_jax.errors import UserError

# Name of a data set that this package builds itself → function of (name, data_dir, size, captions) → ``Source``.
DATA_SETS = {
    **dict.fromkeys(emoji.NAMES, emoji.SceneSource),
}


def is_data_set(source: str) -> bool:
    """Returns whether a source is a TFDS data set, which has splits, and not a folder or a tar."""
    return source in DATA_SETS or source.startswith(PREFIX)


def open_source(
    source: str,
    data_dir: str | Path,
    size: tuple[int, int],
    captions: bool = False,
    key: str = "config.source",
    columns: ColumnsConfig = BY_HABIT,
) -> Source:
    """Returns an image source.

    Args:
      source: a name in ``DATA_SETS``, "tfds:NAME[/config][:version]" (any data set that TFDS has prepared as
        ArrayRecord files), "hf:datasets/OWNER/NAME[@REVISION][:SPLIT]" (a data set of the Hugging Face hub), a folder
        of images, tars and Parquet files, one .tar, or one .parquet.
      data_dir: the folder of all TFDS data sets.
      size: height and width of the images in pixels; photos are scaled and cropped to it (``data.pixels``).
      captions: whether to read captions, too. In a folder or a tar they are files next to the images
        (``data.sidecars``).
      key: name of the setting, for error messages.
      columns: the columns of Parquet files.

    Raises:
      UserError: if the source does not exist, or captions are requested and it has none. Splits are opened later.
    """
    if source in DATA_SETS:
        return DATA_SETS[source](source, data_dir, size, captions)
    if source.startswith(PREFIX):
        return PreparedSource(source, data_dir, size, captions, key)
    families = {name.partition("/")[0] for name in DATA_SETS}
    if source.partition("/")[0] in families and not Path(source).exists():
        raise UserError(f"unknown data set {source!r}; take one of {', '.join(DATA_SETS)}")
    kind = HubSource if huggingface.is_id(source) else FileSource
    return kind(source, size, captions, key, columns)


def open_images(source: str, split: str, data_dir: str | Path, size: tuple[int, int], captions: bool = False) -> Images:
    """Returns the images of one split of a source.

    Args:
      source, data_dir, size, captions: as in ``open_source``.
      split: a split of a data set, or a TFDS slice of one ("train[:100]"). The images of a folder or a tar, sorted by
        path, are one split "train", which can be sliced in the same way ("" = all images).

    Raises:
      UserError: as ``open_source``; also if there is no such split, or it is empty.
    """
    return open_source(source, data_dir, size, captions).images(split)


class FileSource:
    """A folder, a tar or a Parquet file as an image source (``data.examples.Source``); it is listed once."""

    words = None

    def __init__(
        self,
        source: str,
        size: tuple[int, int],
        captions: bool = False,
        key: str = "config.source",
        columns: ColumnsConfig = BY_HABIT,
    ):
        self._source, self._size = source, size
        self._entries = sources.list_source(source, captions, key, columns).entries

    @functools.cached_property
    def identity(self) -> str:
        """The first sixteen hex digits of a hash of the images' ids, sizes in bytes and captions."""
        content = hashlib.sha256()
        for entry in self._entries:
            content.update(json.dumps((entry.id, entry.size, entry.caption, entry.is_passed_over)).encode())
        return content.hexdigest()[:16]

    def images(self, split: str) -> sources.FileImages:
        """Returns the images of a slice. Entries that are passed over are removed after slicing, as in neighbour sets.

        Raises:
          UserError: if there is no such slice, or it has no image.
        """
        entries = [x for x in entries_of_split(self._source, self._entries, split) if not x.is_passed_over]
        if not entries:
            raise UserError(f"{self._source} has no image in {split}; choose another slice")
        return sources.FileImages(sources.root_of(self._source), entries, self._size)


class HubSource:
    """A data set of the Hugging Face hub as an image source (``data.examples.Source``); its identity is the commit.

    Where the id names a split, its images form one split "train", as those of a folder do. Otherwise the splits have
    the data set's names. Each is downloaded and listed when it is opened.
    """

    words = None

    def __init__(self, source: str, *options: Any):
        self._source, self._options = source, options
        self.identity = hub_sets.commit_of(source)

    def images(self, split: str) -> sources.FileImages:
        """Returns the images of a slice; errors as in ``FileSource``, and if the data set cannot be downloaded."""
        name, bracket, rest = (split or hub_sets.TRAIN).partition("[")
        if hub_sets.names_split(self._source) or name == hub_sets.TRAIN:
            return FileSource(self._source, *self._options).images(split)
        return FileSource(f"{self._source}:{name}", *self._options).images(f"{hub_sets.TRAIN}{bracket}{rest}")


def entries_of_split(source: str, entries: list[sources.Entry], split: str) -> list[sources.Entry]:
    """Returns the entries in a slice of the split "train", which holds all entries ("" = all).

    Args:
      source: name of the source, for the message.

    Raises:
      UserError: if there is no such split, or it is empty.
    """
    number = len(entries)
    try:
        whole = SplitInfo(name="train", shard_lengths=[number], num_bytes=0)
        found = [entries[i] for _, i in places(split or "train", {"train": whole})]
        if not found:
            raise ValueError("it is empty")
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        held = (
            f'its {number:,} images form one split, "train"; give a slice of it, such as "train[:-64]" or "train[-64:]"'
        )
        raise UserError(f"{source} has no {split}: {held} ({reason})") from error
    return found
