"""Any data set that TFDS has prepared as ArrayRecord files, read without TensorFlow and without the set's own code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming, read_only_builder
from tensorflow_datasets.core.splits import SplitInfo

from arrag_jax.data import pixels
from arrag_jax.errors import UserError

PREFIX = "tfds:"


class PreparedImages:
    """A split as a random-access source of examples (``data.examples.Examples``) of one size.

    Args:
      source: "tfds:NAME[/config][:version]"; the newest version unless one is given.
      split: a TFDS slice such as "train[:100]" works too.
      data_dir: the folder of all TFDS data sets.
      size: height and width of the images given out.
      captions: must the set have captions?

    Raises:
      UserError: no such set or split there, not as ArrayRecord, or without a feature "image" (or "caption").
    """

    def __init__(self, source: str, split: str, data_dir: str | Path, size: tuple[int, int], captions: bool = False):
        try:
            name, choice = naming.parse_builder_name_kwargs(source.removeprefix(PREFIX), data_dir=str(data_dir))
            builder = read_only_builder.builder_from_files(str(name), **choice)
            features = dict(builder.info.features.items())
            wanted = {"image": tfds.features.Image} | ({"caption": tfds.features.Text} if captions else {})
            for feature, kind in wanted.items():
                if not isinstance(features.get(feature), kind):
                    raise ValueError(f"it has no {kind.__name__} feature {feature!r} among {', '.join(features)}")
            if not builder.info.splits[split].num_examples:
                raise ValueError(f"split {split} is empty")
            self.size, self.splits = size, builder.info.splits
            self.examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split()).strip('"')
            raise UserError(f"config.source={source} with data_dir={data_dir} cannot be read: {reason}") from error

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example, its "image" as uint8 [h, w, 3]; or ``BadImage``."""
        example = self.examples[index]
        return {**example, "image": pixels.decode(example["image"], self.size)}


def places(split: str, splits: Mapping[str, SplitInfo]) -> list[tuple[str, int]]:
    """Where the examples of a TFDS slice stand: "store[7:9]" → [("store", 7), ("store", 8)].

    Raises:
      ValueError, NotImplementedError: TFDS knows no such slice of these splits.
    """
    found = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    wholes = [(x.splitname, range(splits[x.splitname].num_examples)[x.from_ : x.to]) for x in found]
    return [(name, number) for name, numbers in wholes for number in numbers]
