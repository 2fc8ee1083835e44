"""Builds a datastore from images and a tokenizer, and its ScaNN indexes; adds to one, merges and verifies them.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=more --workdir runs/p --append
python -m arrag_jax.build_datastore --merge runs/one --merge runs/two --workdir runs/both
python -m arrag_jax.build_datastore --workdir runs/photos --verify
python -m arrag_jax.build_datastore --workdir runs/photos --report
python -m arrag_jax.build_datastore --config.keys=codebook,latent --config.indexes=latent --workdir runs/photos

The last adds keys and an index to a datastore that is there: with no --config its own settings count, as they were when
it was built. Captions (--config.captions=True) can be added alike. The source must still be there, unchanged.
--report measures the index: recall against exact search, queries a second, bytes a patch.
Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do. Started as several
processes (JAX_COORDINATOR_ADDRESS and so on, see launch/) it shares the work; --workdir is then on a file system that
all of them see.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arrag_jax.command import OPTIONAL_CONFIG, Flag, main_with_config
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.data.examples import DUPLICATE, PASSED_OVER, Examples
from arrag_jax.errors import UserError, printable
from arrag_jax.interfaces import ImageTokenizer
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.processes import require_same
from arrag_jax.retrieval import index
from arrag_jax.retrieval import report as measure
from arrag_jax.retrieval.load import settled
from arrag_jax.retrieval.scann import BY_RULE
from arrag_jax.store import extension, segments, writer
from arrag_jax.store.building import require_same_settings, state_of
from arrag_jax.store.datastore import Datastore, StoreSettings
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
    told_of,
)
from arrag_jax.store.shards import MANIFEST
from arrag_jax.store.skipped import NONE, SkippedCounts
from arrag_jax.store.workers import Workers, workers_in


def run(
    config: DatastoreConfig | None,
    workdir: str,
    append: bool = False,
    merge: Collection[str] = (),
    verify: bool = False,
    report: bool = False,
    keep_duplicates: bool = False,
) -> None:
    """Builds the datastore that the config describes, in --workdir; run again to continue."""
    if jax.process_index() > 0 and (merge or verify or report):
        return  # the first process does these alone
    if sum(map(bool, (append, merge, verify, report))) > 1:
        raise UserError("--append, --merge, --verify and --report exclude one another; give one of them")
    start, directory = time.perf_counter(), Path(workdir)
    if config is None and not (merge or verify or report or (directory / MANIFEST).is_file()):
        raise UserError("missing --config (see --help)")
    if verify:
        check(directory)
    elif report:
        options = BY_RULE if config is None else config.scann
        for kind, figures in settled(directory, lambda: measured(directory, options)).items():
            print(f"index over {kind} keys")
            for name, figure in figures.items():
                print(f"{name:20}{figure:>16,.4f}" if isinstance(figure, float) else f"{name:20}{figure:>16,}")
    elif merge:
        stores = [Datastore.open(store) for store in merge]
        finish(segments.merge(stores, directory, keep_duplicates), config, start)
    elif config is None:
        finish(Datastore.open(directory), None, start)
    else:
        build_or_add(config, directory, append, start, keep_duplicates)


def build_or_add(
    config: DatastoreConfig, directory: Path, append: bool, start: float, keep_duplicates: bool = False
) -> None:
    """This process's part in building the store, or in adding to it."""
    with workers_in(directory, jax.process_index(), jax.process_count()) as workers:
        tokenizer = load_tokenizer(config.model)
        require_same({f"tokenizer of {config.model}": tokenizer.fingerprint}, "model")
        config = with_what_is_held(config, directory, tokenizer, workers, append)
        store = (add if append else build)(config, directory, tokenizer, workers, keep_duplicates)
        if workers.leads:
            finish(store, config, start)
        else:
            workers.wait_for_leader_to_leave()


def with_what_is_held(
    config: DatastoreConfig, directory: Path, tokenizer: ImageTokenizer, workers: Workers, append: bool
) -> DatastoreConfig:
    """The config with all kinds of key (and the captions) of a whole store in the directory, once that has its own.

    What the store lacks is added to it, unless images are to be appended: their kinds must then be among the store's.
    """
    state, found = state_of(Datastore, directory)
    if state != "whole":
        return config
    if append:
        return dataclasses.replace(config, keys=found.keys) if set(config.keys) <= set(found.keys) else config
    keys, captions = extension.all_keys(found.keys, config.keys), config.captions or found.captions
    if (keys, captions) != (found.keys, found.captions):
        held = {"keys": found.keys, "captions": found.captions, "indexes": ()}
        same = dataclasses.replace(spelt_alike(config, [found]), **held)
        require_same_settings(Datastore, directory, settings_of(same, tokenizer, config.num_images or found.num_images))

        def images(settings: StoreSettings, captions: bool) -> tuple[Examples, dict[str, int]]:
            source = ImageSource(settings.source, config.data_dir, captions, tokenizer, "nothing", Path())
            examples = source.images(settings.split)
            return examples, {examples.source_id(number): number for number in range(len(examples))}

        store = Datastore.open(directory)
        extension.extend(store, keys, captions, images, encoder(tokenizer), config.batch_size, workers)
    return dataclasses.replace(config, keys=keys, captions=captions)


def build(
    config: DatastoreConfig,
    directory: Path,
    tokenizer: ImageTokenizer,
    workers: Workers,
    keep_duplicates: bool = False,
    whole: Datastore | None = None,
) -> Datastore | None:
    """The store of the config's images, built by the whole team; None if there are none to take.

    Args:
      keep_duplicates: take images of equal content all; of a build that was begun, as it was begun.
      whole: the store that this one is to be a part of; what it holds or left out is not taken.
    """

    def state() -> tuple[str, StoreSettings | None]:
        return state_of(Datastore, directory)

    if not workers.leads:  # the first process makes the data set, or lists the folder
        workers.wait_until(lambda: state()[0] != "nothing" or workers.leader_has_left())
        if state()[0] == "nothing":
            return None
    begun, found = state()
    config = spelt_alike(config, [found] if found else [])
    keep = found.keep_duplicates if found else keep_duplicates
    source = ImageSource(config.source, config.data_dir, config.captions, tokenizer, begun, directory / LISTING, keep)
    images = source.images(split_of(config), *(names_not_to_take(whole, keep) if whole else ()))
    if begun == "nothing" and len(images) == getattr(images, "num_passed_over", 0):
        return None
    source.keep_listing()
    settings = settings_of(
        config, tokenizer, config.num_images or (found.num_images if begun == "whole" else len(images))
    )
    store = writer.build(
        directory,
        images,
        encoder(tokenizer),
        np.asarray(tokenizer.codebook),
        dataclasses.replace(settings, beside=source.beside, keep_duplicates=keep),
        config.batch_size,
        images.source_id,
        config.max_bad_fraction,
        workers,
        tally_of(whole) if whole else NONE,
        config.min_bad,
        contents_of_files(whole) if whole and not (keep or is_data_set(config.source)) else None,
    )
    if workers.leads:
        (directory / LISTING).unlink(missing_ok=True)
    return store


def add(
    config: DatastoreConfig, directory: Path, tokenizer: ImageTokenizer, workers: Workers, keep_duplicates: bool = False
) -> Datastore:
    """The store with those of the config's images that it did not hold, as one more part."""
    store = Datastore.open(directory)
    store.require_tokenizer(tokenizer.fingerprint)
    segments.require_fits(store, settings_of(config, tokenizer, 1))
    config = spelt_alike(config, [x.settings for x in (store, *store.segments)])
    part = segments.next_segment(store)
    _, found = state_of(Datastore, part)
    if found and not is_same_source(found, config.source):
        raise UserError(f"{part} is what is left of adding {found.source}; run that command again first, or delete it")
    if build(config, part, tokenizer, workers, keep_duplicates, store) is None:
        print(f"nothing to add: {directory} holds every image of {printable(config.source)}")
        return store
    return segments.add_segment(store, part, functools.partial(new_indexes, config)) if workers.leads else store


@contextlib.contextmanager
def new_indexes(config: DatastoreConfig, store: Datastore) -> Iterator[None]:
    """Builds the indexes that are wanted of a store beside those that are there; on leaving they take their place."""
    with contextlib.ExitStack() as stack:
        for kind in config.indexes:
            stack.enter_context(index.new_index(store, kind, config.scann, config.index_shards))
        yield


def names_not_to_take(store: Datastore, keep_duplicates: bool) -> tuple[set[str], set[str]]:
    """Names of what the store holds or left out, and of what it passed over, which may be read by now."""
    left_out = names_left_out(store)
    passed_over = {name for name, reason in left_out if reason.startswith(PASSED_OVER)}
    known = {*names_in(store), *(name for name, _ in left_out)} - passed_over
    if keep_duplicates:
        known -= {name for name, reason in left_out if reason.startswith(DUPLICATE)}
    return known, passed_over


def tally_of(store: Datastore) -> SkippedCounts:
    """How many images a store went through, and how many of them were bad."""
    return SkippedCounts(store.num_images + store.num_duplicates + store.num_bad, store.num_bad)


def spelt_alike(config: DatastoreConfig, known: Collection[StoreSettings]) -> DatastoreConfig:
    """The config, its source spelt as in the first of these settings that mean the same file or folder by theirs."""
    spelt = next((x.source for x in known if is_same_source(x, config.source)), config.source)
    return dataclasses.replace(config, source=spelt)


def split_of(config: DatastoreConfig) -> str:
    """The split of a data set; files have none."""
    return config.split if is_data_set(config.source) else ""


def settings_of(config: DatastoreConfig, tokenizer: ImageTokenizer, num_images: int) -> StoreSettings:
    """What the store of the first images of the config's source is to hold."""
    return StoreSettings(
        fingerprint=tokenizer.fingerprint,
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        code_dim=tokenizer.codebook.shape[1],
        keys=config.keys,
        captions=config.captions,
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


def recorded(flags: dict[str, Any]) -> dict[str, Any]:
    """The config of the store in --workdir (of the first one to merge), without indexes, as it was built.

    Raises:
      UserError: there is no whole store.
    """
    directory = Path((flags["merge"] or [flags["workdir"]])[0])
    if not (directory / MANIFEST).is_file():
        raise UserError(f"missing --config (see --help): {directory} holds no datastore whose settings could be taken")
    settings = Datastore.open(directory).settings
    known = {"model": settings.model, "split": settings.split, "data_dir": settings.data_dir}
    known = {key: value for key, value in known.items() if value}  # stores made before recorded none
    return known | {
        "source": settings.source,
        "batch_size": settings.batch_size or DatastoreConfig.batch_size,
        "shard_size": settings.shard_size,
        "keys": settings.keys,
        "captions": settings.captions,
        "indexes": (),
    }


def measured(directory: Path, options: ScannOptions) -> dict[str, dict[str, float | int]]:
    """The figures of each of a store's indexes, by kind of key."""
    store = Datastore.open(directory)
    return {kind: measure.report(store, options, kind) for kind in measure.indexed(store)}


def check(directory: Path) -> None:
    """Reads every file of a store and of its indexes, and says so if all are as they were written."""

    def verified() -> Datastore:
        store = Datastore.open(directory)
        store.verify()
        index.verify_indexes(store)
        return store

    store = settled(directory, verified)
    print(f"datastore {directory} is as it was written: {store.num_images:,} images")


def finish(store: Datastore, config: DatastoreConfig | None, start: float) -> None:
    """Builds the indexes that are wanted and not there, and says what the store holds."""
    if config is None:  # indexes that fit may have options of their own
        kinds, options = [kind for kind in measure.indexed(store) if not index.fits(store, kind)], (ScannOptions(), 1)
    else:
        kinds, options = config.indexes, (config.scann, config.index_shards)
    for kind in kinds:
        index.refresh_index(store, kind, *options)
    size = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    there = ", ".join(kind for kind in store.settings.keys if index.fits(store, kind))
    indexes = f"ScaNN over {there} keys" if there else "no index"
    told = told_of(store.wholes, "that cannot be read", store.num_duplicates)
    wordless = f" ({sum(not words for words in store.captions):,} without caption)" if store.settings.captions else ""
    print(
        f"datastore {store.directory} is complete: {store.num_images:,} images{wordless}{told}, "
        f"{store.num_patches:,} patches, {indexes}, {size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main_with_config(
        run,
        DatastoreConfig,
        "apart",
        recorded=recorded,
        config=OPTIONAL_CONFIG,
        workdir=Flag("folder of the datastore; made when absent", path=True),
        report=Flag("measure the index in --workdir, print the figures and write them to report.json", False),
        append=Flag("add the images of config.source that the datastore does not hold yet", False),
        merge=Flag("datastore to copy into --workdir; give it several times, in order", (), path=True),
        keep_duplicates=Flag("take files of equal content all, and what --append and --merge find twice", False),
        verify=Flag("read every file in --workdir: exit 0, or the name of the damaged one", False),
    )
