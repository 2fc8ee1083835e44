"""Reads any data set that TFDS has prepared as ArrayRecord files, without TensorFlow and the data set's own code."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming, read_only_builder
from tensorflow_datasets.core.splits import SplitInfo

from arrag_jax.data import pixels
from arrag_jax.data.examples import caption_of
from arrag_jax.errors import UserError

PREFIX = "tfds:"


class PreparedSource:
    """A prepared data set as an image source (``data.examples.Source``).

    Its identity is the name, config and version of the data set, because a source without a version means the newest.

    Args:
      source: "tfds:NAME[/config][:version]"; without a version, the newest one.
      data_dir: the folder of all TFDS data sets.
      size: height and width of the images that are returned.
      captions: whether the data set must have captions.
      key: name of the setting, for error messages.

    Raises:
      UserError: if there is no such data set, or it is not in ArrayRecord files.
    """

    words = None

    def __init__(
        self,
        source: str,
        data_dir: str | Path,
        size: tuple[int, int],
        captions: bool = False,
        key: str = "config.source",
    ):
        self._source, self._size, self._captions = source, size, captions
        self._told = functools.partial(_told, source, data_dir, key)
        with self._told():
            self._builder = _builder(source, data_dir)
            self.identity = self._builder.info.full_name

    def images(self, split: str) -> "PreparedImages":
        """Returns the images of a split, or of a TFDS slice such as "train[:100]".

        Raises:
          UserError: if there is no such split, it is empty, or the data set lacks the feature "image" (or "caption").
        """
        with self._told():
            features = dict(self._builder.info.features.items())
            wanted = {"image": tfds.features.Image} | ({"caption": tfds.features.Text} if self._captions else {})
            for feature, kind in wanted.items():
                if not isinstance(features.get(feature), kind):
                    raise ValueError(f"it has no {kind.__name__} feature {feature!r} among {', '.join(features)}")
            if not self._builder.info.splits[split].num_examples:
                raise ValueError(f"split {split} is empty")
            return PreparedImages(self._source, self._builder, split, self._size)


class PreparedImages:
    """A split of a prepared data set as a random-access source (``data.examples.Images``) of images of one size."""

    def __init__(self, source: str, builder: read_only_builder.ReadOnlyBuilder, split: str, size: tuple[int, int]):
        self.source, self.size, self.places = source, size, places(split, builder.info.splits)
        self.examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example, with "image" as uint8 [h, w, 3].

        Raises:
          BadImage: if the image cannot be decoded.
        """
        example = self.examples[index]
        return {**example, "image": pixels.decode(example["image"], self.size)}

    def source_id(self, index: int) -> str:
        """Returns the id of an image, such as "tfds:pets/train/17"."""
        split, number = self.places[index]
        return f"{self.source}/{split}/{number}"

    def caption(self, index: int) -> str:
        """Returns the caption of an image without decoding its pixels."""
        return caption_of(self.examples[index])


@contextlib.contextmanager
def _told(source: str, data_dir: str | Path, key: str) -> Iterator[None]:
    """Turns the errors that TFDS raises for an unreadable data set into a UserError that names the data set."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).strip('"')
        raise UserError(f"{key}={source} with data_dir={data_dir} cannot be read: {reason}") from error


def _builder(source: str, data_dir: str | Path) -> read_only_builder.ReadOnlyBuilder:
    name, choice = naming.parse_builder_name_kwargs(source.removeprefix(PREFIX), data_dir=str(data_dir))
    return read_only_builder.builder_from_files(str(name), **choice)


def places(split: str, splits: Mapping[str, SplitInfo]) -> list[tuple[str, int]]:
    """Returns split and number of each example of a TFDS slice: "store[7:9]" → [("store", 7), ("store", 8)].

    Raises:
      ValueError, NotImplementedError: if TFDS knows no such slice of these splits.
    """
    found = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    wholes = [(x.splitname, range(splits[x.splitname].num_examples)[x.from_ : x.to]) for x in found]
    return [(name, number) for name, numbers in wholes for number in numbers]
