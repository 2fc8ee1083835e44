"""Any data set that TFDS has prepared as ArrayRecord files, read without TensorFlow and without the set's own code."""

import contextlib
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
    """A prepared set as an image source (``data.examples.Source``); the arguments are those of ``PreparedImages``.

    Its identity is name, config and version of the set, because the newest version counts where the source names none.
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
        self._source, self._data_dir, self._size, self._captions, self._key = source, data_dir, size, captions, key
        with _told(source, data_dir, key):
            self.identity = _builder(source, data_dir).info.full_name

    def images(self, split: str) -> "PreparedImages":
        """Returns the images of a split."""
        return PreparedImages(self._source, split, self._data_dir, self._size, self._captions, self._key)


class PreparedImages:
    """A split as a random-access source of examples (``data.examples.Images``) of one size.

    Args:
      source: "tfds:NAME[/config][:version]"; the newest version unless one is given.
      split: a TFDS slice such as "train[:100]" works too.
      data_dir: the folder of all TFDS data sets.
      size: height and width of the images given out.
      captions: must the set have captions?
      key: how errors call the source.

    Raises:
      UserError: no such set or split there, not as ArrayRecord, or without a feature "image" (or "caption").
    """

    def __init__(
        self,
        source: str,
        split: str,
        data_dir: str | Path,
        size: tuple[int, int],
        captions: bool = False,
        key: str = "config.source",
    ):
        with _told(source, data_dir, key):
            builder = _builder(source, data_dir)
            features = dict(builder.info.features.items())
            wanted = {"image": tfds.features.Image} | ({"caption": tfds.features.Text} if captions else {})
            for feature, kind in wanted.items():
                if not isinstance(features.get(feature), kind):
                    raise ValueError(f"it has no {kind.__name__} feature {feature!r} among {', '.join(features)}")
            if not builder.info.splits[split].num_examples:
                raise ValueError(f"split {split} is empty")
            self.source, self.size, self.places = source, size, places(split, builder.info.splits)
            self.examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example, its "image" as uint8 [h, w, 3]; or ``BadImage``."""
        example = self.examples[index]
        return {**example, "image": pixels.decode(example["image"], self.size)}

    def source_id(self, index: int) -> str:
        """The id of an image: "tfds:pets/train/17"."""
        split, number = self.places[index]
        return f"{self.source}/{split}/{number}"

    def caption(self, index: int) -> str:
        """The caption of an image; its file is read and not decoded."""
        return caption_of(self.examples[index])


@contextlib.contextmanager
def _told(source: str, data_dir: str | Path, key: str) -> Iterator[None]:
    """Makes what TFDS raises where a set cannot be read a UserError that names it."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).strip('"')
        raise UserError(f"{key}={source} with data_dir={data_dir} cannot be read: {reason}") from error


def _builder(source: str, data_dir: str | Path) -> read_only_builder.ReadOnlyBuilder:
    name, choice = naming.parse_builder_name_kwargs(source.removeprefix(PREFIX), data_dir=str(data_dir))
    return read_only_builder.builder_from_files(str(name), **choice)


def places(split: str, splits: Mapping[str, SplitInfo]) -> list[tuple[str, int]]:
    """Where the examples of a TFDS slice stand: "store[7:9]" → [("store", 7), ("store", 8)].

    Raises:
      ValueError, NotImplementedError: TFDS knows no such slice of these splits.
    """
    found = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    wholes = [(x.splitname, range(splits[x.splitname].num_examples)[x.from_ : x.to]) for x in found]
    return [(name, number) for name, numbers in wholes for number in numbers]
