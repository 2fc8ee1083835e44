"""Builds and extends stores from the images that a config names."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax.config import DatastoreConfig
from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, Images
from arrag_jax.errors import UserError, printable
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.remote import local_copy
from arrag_jax.store import extension, segments, writer
from arrag_jax.store.building import require_same_settings, state_of
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import EncodedImages
from arrag_jax.store.identity import contents_of_files
from arrag_jax.store.images import (
    LISTING,
    ImageSource,
    encoder,
    is_data_set,
    is_same_source,
    names_in,
    names_left_out,
    origin_of,
)
from arrag_jax.store.shards import MANIFEST
from arrag_jax.store.skipped import SkipLimit, SkippedCounts
from arrag_jax.work import Engine, Opened


def with_what_is_held(
    config: DatastoreConfig, directory: Path, tokenizer: ImageTokenizer, engine: Engine, append: bool
) -> DatastoreConfig:
    """Returns the config with all kinds of key (and the captions) of the complete store in ``directory``.

    If the store lacks kinds of key or captions of the config, this function first adds them to the store. With
    ``append`` it adds nothing; the config's kinds of key are then replaced by the store's if these contain them. Where
    the directory holds no complete store, the config is returned as it is.
    """
    state, found = state_of(Datastore, directory)
    if state != "whole":
        return config
    if append:
        return dataclasses.replace(config, keys=found.keys) if set(config.keys) <= set(found.keys) else config
    if config.rights and not found.rights:
        raise UserError(
            f"datastore {directory} was built without rights; record them: --rights=FOLDER, without a config"
        )
    config = dataclasses.replace(config, rights=found.rights)
    keys, captions = extension.all_keys(found.keys, config.keys), config.captions or found.captions
    if (keys, captions) != (found.keys, found.captions):
        held = {"keys": found.keys, "captions": found.captions, "indexes": ()}
        same = dataclasses.replace(spelt_alike(config, [found]), **held)
        require_same_settings(Datastore, directory, settings_of(same, tokenizer, config.num_images or found.num_images))
        read = Opened(functools.partial(_reader, config), _reader(config, tokenizer))
        extension.extend(Datastore.open(directory), keys, captions, read, engine)
    return dataclasses.replace(config, keys=keys, captions=captions)


def _reader(config: DatastoreConfig, tokenizer: ImageTokenizer | None = None) -> extension.Reader:
    """Returns how ``extension`` reads the images of a segment again; without a tokenizer, that of the config."""
    encoded_by = tokenizer or load_tokenizer(config.model)

    def read(settings: StoreSettings, captions: bool) -> tuple[EncodedImages, dict[str, int]]:
        source = ImageSource(
            settings.source, config.data_dir, captions, encoded_by, "nothing", Path(), columns=settings.columns
        )
        examples = source.images(settings.split)
        encoded = EncodedImages(examples, examples.source_id, encoder(encoded_by), config.batch_size)
        return encoded, {examples.source_id(number): number for number in range(len(examples))}

    return read


def build(
    config: DatastoreConfig,
    directory: Path,
    tokenizer: ImageTokenizer,
    engine: Engine,
    keep_duplicates: bool = False,
    whole: Datastore | None = None,
) -> Datastore | None:
    """Builds the store of the config's images; returns None if there are no images to store.

    Args:
      config: names the images and the settings.
      directory: where the store is built.
      tokenizer: encodes the images.
      engine: where the images are encoded.
      keep_duplicates: store all images of equal content; an unfinished build keeps the value that it started with.
      whole: the store that the new one becomes a segment of; images that it holds or left out are not stored again.
    """

    about, anything = f"images for {directory}", "anything"
    if not engine.leads and engine.meet(about) != anything:  # the first one prepares the data set, or lists the folder
        return None
    begun, found = state_of(Datastore, directory)
    config = spelt_alike(config, [found] if found else [])
    keep = found.keep_duplicates if found else keep_duplicates
    state = begun if engine.leads or begun == "whole" else "begun"
    source, images = _images(config, directory, tokenizer, state, keep, whole)
    if engine.leads:
        nothing = begun == "nothing" and len(images) == getattr(images, "num_passed_over", 0)
        if not nothing:
            source.keep_listing()
        if engine.meet(about, "nothing" if nothing else anything) != anything:
            return None
    settings = settings_of(
        config, tokenizer, config.num_images or (found.num_images if found and begun == "whole" else len(images))
    )
    elsewhere = counts_of(whole) if whole else SkippedCounts(0, 0)
    again = functools.partial(_encoded_again, config, directory, keep, whole.directory if whole else None)
    store = writer.build_datastore(
        directory,
        Opened(again, EncodedImages(images, images.source_id, encoder(tokenizer), config.batch_size)),
        np.asarray(tokenizer.codebook),
        dataclasses.replace(settings, beside=source.beside, keep_duplicates=keep),
        SkipLimit(config.max_bad_fraction, config.min_bad, elsewhere),
        engine,
        contents_of_files(whole) if whole and not (keep or is_data_set(config.source)) else None,
    )
    if engine.leads:
        (directory / LISTING).unlink(missing_ok=True)
    return store


def _images(
    config: DatastoreConfig,
    directory: Path,
    tokenizer: ImageTokenizer,
    state: str,
    keep_duplicates: bool,
    whole: Datastore | None,
) -> tuple[ImageSource, Images]:
    """Returns the config's source and the images of it that a build takes; arguments as in ``build``."""
    source = ImageSource(
        config.source,
        config.data_dir,
        config.captions,
        tokenizer,
        state,
        directory / LISTING,
        keep_duplicates,
        config.columns,
        config.rights,
    )
    return source, source.images(split_of(config), *(names_not_to_take(whole, keep_duplicates) if whole else ()))


def _encoded_again(config: DatastoreConfig, directory: Path, keep: bool, whole: Path | None) -> EncodedImages:
    """Returns the images of an unfinished build, opened in a process that did not begin it."""
    tokenizer = load_tokenizer(config.model)
    _, images = _images(config, directory, tokenizer, "begun", keep, Datastore.open(whole) if whole else None)
    return EncodedImages(images, images.source_id, encoder(tokenizer), config.batch_size)


def add(
    config: DatastoreConfig,
    directory: Path,
    tokenizer: ImageTokenizer,
    engine: Engine,
    keep_duplicates: bool = False,
    prepare: Callable[[Datastore], AbstractContextManager] | None = None,
) -> Datastore:
    """Adds the config's images that the store does not hold yet as a new segment; returns the store.

    Args:
      config: names the images and the settings.
      directory: the store's folder.
      tokenizer: encodes the images.
      engine: where the images are encoded.
      keep_duplicates: as in ``build``.
      prepare: as in ``segments.add_segment``.

    Raises:
      UserError: if the tokenizer or settings do not fit the store, or another addition is unfinished.
    """
    store = Datastore.open(directory)
    store.require_tokenizer(tokenizer.fingerprint)
    segments.require_fits(store, settings_of(config, tokenizer, 1))
    config = spelt_alike(config, [x.settings for x in (store, *store.segments)])
    segment = segments.next_segment(store)
    _, found = state_of(Datastore, segment)
    if found and not is_same_source(found, config.source):
        left = f"{segment} is what is left of adding {found.source}"
        raise UserError(f"{left}; run that command again first, or delete it")
    if build(config, segment, tokenizer, engine, keep_duplicates, store) is None:
        print(f"nothing to add: {directory} holds every image of {printable(config.source)}")
        return store
    return segments.add_segment(store, segment, prepare) if engine.leads else store


def names_not_to_take(store: Datastore, keep_duplicates: bool) -> tuple[set[str], set[str]]:
    """Returns the names of the images that are not taken again, and of those that the store passed over.

    The first set has the images that the store holds or left out. The second set is separate, because an image that was
    passed over may be readable now.
    """
    left_out = names_left_out(store)
    passed_over = {name for name, reason in left_out if reason.startswith(PASSED_OVER)}
    known = {*names_in(store), *(name for name, _ in left_out)} - passed_over
    if keep_duplicates:
        known -= {name for name, reason in left_out if reason.startswith(DUPLICATE)}
    return known, passed_over


def counts_of(store: Datastore) -> SkippedCounts:
    """Returns how many images a store went through, and how many of them were bad."""
    return SkippedCounts(store.num_images + store.num_duplicates + store.num_bad, store.num_bad)


def spelt_alike(config: DatastoreConfig, known: Collection[StoreSettings]) -> DatastoreConfig:
    """Returns the config with its source spelt as in the first of ``known`` that names the same file or folder."""
    spelt = next((x.source for x in known if is_same_source(x, config.source)), config.source)
    return dataclasses.replace(config, source=spelt)


def split_of(config: DatastoreConfig) -> str:
    """Returns the split of a data set; "" for a folder or tar, which has no splits."""
    return config.split if is_data_set(config.source) else ""


def settings_of(config: DatastoreConfig, tokenizer: ImageTokenizer, num_images: int) -> StoreSettings:
    """Returns the settings of a store of the first ``num_images`` images of the config's source."""
    return StoreSettings(
        fingerprint=tokenizer.fingerprint,
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        code_dim=tokenizer.codebook.shape[1],
        keys=config.keys,
        captions=config.captions,
        rights=config.rights,
        columns=config.columns,
        num_images=num_images,
        shard_size=config.shard_size,
        source=config.source,
        split=split_of(config),
        origin=origin_of(config.source),
        command=" ".join(["python -m arrag_jax.build_datastore", *sys.argv[1:]]),
        model=config.model,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
    )


def recorded_config(directory: Path) -> dict[str, Any]:
    """Returns the config fields with which the store in ``directory`` was built; ``indexes`` is empty.

    Raises:
      UserError: if there is no complete store.
    """
    directory = Path(local_copy(directory, MANIFEST))
    if not (directory / MANIFEST).is_file():
        raise UserError(f"missing --config (see --help): {directory} holds no datastore whose settings could be taken")
    settings = Datastore.open(directory).settings
    known = {"model": settings.model, "split": settings.split, "data_dir": settings.data_dir}
    known = {key: value for key, value in known.items() if value}  # older stores recorded none
    return known | {
        "source": settings.source,
        "batch_size": settings.batch_size or DatastoreConfig.batch_size,
        "shard_size": settings.shard_size,
        "keys": settings.keys,
        "captions": settings.captions,
        "rights": settings.rights,
        "columns": dataclasses.asdict(settings.columns),
        "indexes": (),
    }
