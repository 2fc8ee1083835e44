"""TFDS builder of ``emoji_scenes``: the images and captions of ``scenes.py``, written as ArrayRecord files.

Importing this module registers the builder, so that ``tfds.builder("emoji_scenes/small", data_dir=...)`` finds it.
Neither building nor reading needs TensorFlow.
"""

import functools
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from arrag_jax import console, progress
from arrag_jax.data.emoji import scenes
from arrag_jax.data.emoji.classes import COLOURS, SPRITES
from arrag_jax.data.emoji.worlds import LONG_TAIL, PERIOD, STANDARD, World
from arrag_jax.data.examples import caption_of
from arrag_jax.data.prepared import places
from arrag_jax.errors import UserError
from arrag_jax.files import exclusive_lock, write_errors

_DESCRIPTION = """
48 x 48 pictures of one to four Twemoji sprites on plain grounds, with captions in GenEval's six families.
Splits are disjoint by picture. Some class pairs and colour-class pairs occur in captions of test and knowledge only;
in long_tail, classes are ranked by how often train and store show them, and some are absent there.
Sprites: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0.
"""


@dataclass
class EmojiScenesConfig(tfds.core.BuilderConfig):
    """A world and a size: the number of scenes in each split. An index gives the same scene in every size."""

    sizes: tuple[tuple[str, int], ...] = ()
    world: World = STANDARD


def _config(name: str, world: World, **sizes: int) -> EmojiScenesConfig:
    return EmojiScenesConfig(name=name, description=f"Scenes: {sizes}", sizes=tuple(sizes.items()), world=world)


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Builds the data set; examples are in the order of their index."""

    # Nothing is downloaded. Without this line TFDS looks for a file of checksums next to this module, and for that it
    # imports importlib_resources, which it does not declare as a dependency.
    url_infos = None
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {  # noqa: RUF012 - TFDS reads this class attribute
        "1.0.0": "First release.",
        "1.1.0": "full has 100,000 scenes to train on, the first 40,000 of them as before.",
        "1.2.0": "The split knowledge, and the long-tailed world; the scenes of the other splits as before.",
    }
    BUILDER_CONFIGS = [  # noqa: RUF012
        _config("full", STANDARD, train=100_000, store=120_000, valid=2_000, test=2_000, knowledge=12_000),
        _config("small", STANDARD, train=600, store=12_000, valid=512, test=600, knowledge=2_000),
        _config("tiny", STANDARD, train=64, store=64, valid=64, test=64, knowledge=64),
        _config(
            "long_tail",
            LONG_TAIL,
            train=PERIOD,
            store=PERIOD,
            valid=2_000,
            test=2_000,
            knowledge=12_000,
            sprites=20_000,
        ),
        _config("long_tail_tiny", LONG_TAIL, train=64, store=64, valid=64, test=64, knowledge=64, sprites=64),
    ]

    bar: progress.Bar | None = None  # counts the scenes that have been rendered

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any):
        """Uses ArrayRecord, because TFDS's default, TFRecord, has no random access and needs TensorFlow."""
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the features of an example.

        Classes, colours and boxes (x0, y0, x1, y1 in pixels) are padded with -1 to four sprites. A class is an index
        into ``classes.SPRITES``. A colour is an index into ``classes.COLOURS``, or -1 for natural colours. In a world
        with groups, "group" is the group of the scene's rarest class, and "train_scenes" is how many scenes of train
        show that class.
        """
        slots = scenes.MAX_SPRITES
        features = {
            "image": tfds.features.Image(shape=(scenes.SIDE, scenes.SIDE, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "family": tfds.features.Text(),
            "index": tfds.features.Scalar(np.int32),
            "classes": tfds.features.Tensor(shape=(slots,), dtype=np.int32),
            "colours": tfds.features.Tensor(shape=(slots,), dtype=np.int32),
            "boxes": tfds.features.Tensor(shape=(slots, 4), dtype=np.int32),
        }
        if self.builder_config.world.groups:
            features |= {"group": tfds.features.Text(), "train_scenes": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("caption", "image"),
            homepage="https://github.com/jdecked/twemoji",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split, count) for split, count in self.builder_config.sizes}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        world = self.builder_config.world
        for index in range(count):
            drawn = scenes.scene(split, index, world)
            yield index, _example(drawn, index) | _rarity(drawn, world)
            if self.bar is not None:
                self.bar.update()


WORLDS = {f"emoji_scenes/{config.name}": config.world for config in EmojiScenes.BUILDER_CONFIGS}
NAMES = tuple(WORLDS)


def _example(scene: scenes.Scene, index: int) -> dict[str, Any]:
    png = io.BytesIO()  # TFDS encodes an array with TensorFlow, but stores a file unchanged
    Image.fromarray(scenes.render(scene)).save(png, "PNG", compress_level=1)
    png.seek(0)
    names, tints = list(SPRITES), list(COLOURS)
    classes = np.full(scenes.MAX_SPRITES, -1, np.int32)
    colours = np.full(scenes.MAX_SPRITES, -1, np.int32)
    boxes = np.full((scenes.MAX_SPRITES, 4), -1, np.int32)
    for slot, sprite in enumerate(scene.sprites):
        classes[slot] = names.index(sprite.name)
        colours[slot] = tints.index(sprite.colour) if sprite.colour else -1
        boxes[slot] = sprite.box
    return {
        "image": png,
        "caption": scene.caption,
        "family": scene.family,
        "index": index,
        "classes": classes,
        "colours": colours,
        "boxes": boxes,
    }


def _rarity(scene: scenes.Scene, world: World) -> dict[str, Any]:
    """Returns the features that only scenes of a world with groups have."""
    if not world.groups:
        return {}
    return {
        "group": scenes.group(scene, world),
        "train_scenes": world.train_scenes[scenes.rarest(scene, world)],
    }


def _prepare(builder: EmojiScenes, name: str) -> None:
    """Writes the data set. Shows one progress bar over all splits or, if the console is not quiet, TFDS's own bars."""
    tfds.display_progress_bar(progress.shown() and not console.is_quiet())
    total = sum(count for _, count in builder.builder_config.sizes)
    own = progress.bar(total=total, unit="scene", desc=f"making {name}", wanted=console.is_quiet())
    with own as builder.bar, console.without_prints():
        builder.download_and_prepare()


def load_source(name: str, split: str, data_dir: str | Path, *, images: bool = True) -> Sequence[dict[str, Any]]:
    """Returns the random-access source of a split; builds the data set if it is absent.

    If several processes call this, one builds and the others wait. TFDS builds in a temporary folder and renames it at
    the end, so an interrupted build never looks complete.

    Args:
      name: one of ``NAMES``.
      split: a split of the name's world, such as ``train``; a TFDS slice such as ``train[:100]`` works, too.
      data_dir: the folder of all TFDS data sets.
      images: if False, "image" is the bytes of a PNG file, which is much faster.

    Raises:
      UserError: if the name or split is unknown, the slice is beyond the end of the split, or the folder cannot be
        written.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}; take one of {', '.join(NAMES)}")
    splits = WORLDS[name].splits
    if split.split("[")[0] not in splits:
        raise UserError(f"unknown split {split!r} of {name}; take one of {', '.join(splits)}")
    builder = tfds.builder(name, data_dir=str(data_dir))
    if not builder.is_prepared():
        sizes = Path(data_dir) / builder.name
        with write_errors(Path(data_dir)):
            sizes.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(sizes, wait=True, alone=jax.process_count() == 1):
                # Look again, because another process may have built it while this one waited for the lock.
                builder = tfds.builder(name, data_dir=str(data_dir))
                if not builder.is_prepared():
                    logging.info("building %s in %s", name, data_dir)
                    _prepare(builder, name)
    try:
        return builder.as_data_source(split, decoders=None if images else {"image": tfds.decode.SkipDecoding()})
    except ValueError as error:
        whole = split.split("[")[0]
        held = f"{whole} holds {builder.info.splits[whole].num_examples:,} scenes"
        raise UserError(f"{name} has no {split}: {held} ({' '.join(str(error).split())})") from error


class SceneSource:
    """A world in some size as an image source (``data.examples.Source``); it is built when a split is requested.

    Args:
      name, data_dir: as in ``load_source``.
      size: height and width that the images must have.
    """

    identity = ""  # the scenes of a name never change

    def __init__(self, name: str, data_dir: str | Path, size: tuple[int, int], captions: bool = False):
        del captions  # every scene has one
        self._name, self._data_dir, self._size = name, data_dir, size

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the captions of all splits."""
        return scenes.words(WORLDS[self._name])

    def images(self, split: str) -> "SceneImages":
        """Returns the images of a split."""
        return SceneImages(self._name, split, self._data_dir, self._size)


class SceneImages:
    """A split or slice of the data set (``data.examples.Images``), decoded by TFDS.

    Raises:
      UserError: as ``load_source``; also if the split is empty or ``size`` is not the size of the scenes.
    """

    def __init__(self, name: str, split: str, data_dir: str | Path, size: tuple[int, int]):
        self._load = functools.partial(load_source, name, split, data_dir)
        self._examples, self._name = self._load(), name
        if len(self._examples) == 0:
            raise UserError(f"split {split} of {name} is empty; choose another")
        found, wanted = self._examples[0]["image"].shape, (*size, 3)
        if found != wanted:
            raise UserError(f"images of {name} are {found}, the model's tokenizer takes {wanted}; use another model")
        self._places = places(split, cast(Any, self._examples).dataset_info.splits)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]

    def source_id(self, index: int) -> str:
        """Returns the id of an image, such as "emoji_scenes/full/store/17"."""
        split, number = self._places[index]
        return f"{self._name}/{split}/{number}"

    @functools.cached_property
    def _files(self) -> Sequence[dict[str, Any]]:
        return self._load(images=False)

    def caption(self, index: int) -> str:
        """Returns the caption of an image without decoding its pixels."""
        return caption_of(self._files[index])
