"""Builds a datastore from images and a tokenizer, and its ScaNN indexes; adds to one, merges and verifies them.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=more --workdir runs/p --append
python -m arrag_jax.build_datastore --merge runs/one --merge runs/two --workdir runs/both
python -m arrag_jax.build_datastore --workdir runs/photos --verify
python -m arrag_jax.build_datastore --workdir runs/photos --report

--report measures the index: recall against exact search, queries a second, bytes a patch.
Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do. Started as several
processes (JAX_COORDINATOR_ADDRESS and so on, see launch/) it shares the work; --workdir is then on a file system that
all of them see.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.data.images import (
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
from arrag_jax.errors import UserError, printable
from arrag_jax.mesh import start_distributed
from arrag_jax.models.checkpoint import fingerprint, load_model
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.retrieval import index, parts, writer
from arrag_jax.retrieval import report as measure
from arrag_jax.retrieval.bad_images import NONE, Tally
from arrag_jax.retrieval.building import state_of
from arrag_jax.retrieval.datastore import Datastore, StoreSettings
from arrag_jax.retrieval.identity import contents_of_files
from arrag_jax.retrieval.scann import BY_RULE
from arrag_jax.retrieval.shards import DUPLICATE, PASSED_OVER
from arrag_jax.retrieval.team import Team, team_in


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
    if sum(map(bool, (append, merge, verify, report))) > 1:
        raise UserError("--append, --merge, --verify and --report exclude one another; give one of them")
    if config is None and not (merge or verify or report):
        raise UserError("missing --config (see --help)")
    start, directory = time.perf_counter(), Path(workdir)
    if verify:
        check(directory)
    elif report:
        options = BY_RULE if config is None else config.scann
        store = Datastore.open(directory)
        for kind in measure.indexed(store):
            print(f"index over {kind} keys")
            for name, figure in measure.report(store, options, kind).items():
                print(f"{name:20}{figure:>16,.4f}" if isinstance(figure, float) else f"{name:20}{figure:>16,}")
    elif merge:
        stores = [Datastore.open(store) for store in merge]
        finish(parts.merge(stores, directory, keep_duplicates), config, start)
    else:
        start_distributed()
        try:
            build_or_add(config, directory, append, start, keep_duplicates)
        except UserError as error:
            if jax.process_count() == 1:
                raise
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
            os._exit(2)  # a plain exit would have jax wait for processes that may be dead


def build_or_add(
    config: DatastoreConfig, directory: Path, append: bool, start: float, keep_duplicates: bool = False
) -> None:
    """This process's part in building the store, or in adding to it."""
    with team_in(directory, jax.process_index(), jax.process_count()) as team:
        tokenizer = load_model(config.model, parts=VISION)
        store = (add if append else build)(config, directory, tokenizer, team, keep_duplicates)
        if team.leads:
            finish(store, config, start)
        else:
            team.wait_for_leader_to_leave()


def build(
    config: DatastoreConfig,
    directory: Path,
    tokenizer: Janus,
    team: Team,
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

    if not team.leads:  # the first process makes the data set, or lists the folder
        team.wait_until(lambda: state()[0] != "nothing" or team.leader_has_left())
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
        team,
        tally_of(whole) if whole else NONE,
        config.min_bad,
        contents_of_files(whole) if whole and not (keep or is_data_set(config.source)) else None,
    )
    if team.leads:
        (directory / LISTING).unlink(missing_ok=True)
    return store


def add(
    config: DatastoreConfig, directory: Path, tokenizer: Janus, team: Team, keep_duplicates: bool = False
) -> Datastore:
    """The store with those of the config's images that it did not hold, as one more part."""
    store = Datastore.open(directory)
    store.require_tokenizer(fingerprint(tokenizer))
    parts.require_fits(store, settings_of(config, tokenizer, 1))
    config = spelt_alike(config, [x.settings for x in (store, *store.parts)])
    part = parts.next_part(store)
    _, found = state_of(Datastore, part)
    if found and not is_same_source(found, config.source):
        raise UserError(f"{part} is what is left of adding {found.source}; run that command again first, or delete it")
    if build(config, part, tokenizer, team, keep_duplicates, store) is None:
        print(f"nothing to add: {directory} holds every image of {printable(config.source)}")
        return store
    return parts.add_part(store, part) if team.leads else store


def names_not_to_take(store: Datastore, keep_duplicates: bool) -> tuple[set[str], set[str]]:
    """Names of what the store holds or left out, and of what it passed over, which may be read by now."""
    left_out = names_left_out(store)
    passed_over = {name for name, reason in left_out if reason.startswith(PASSED_OVER)}
    known = {*names_in(store), *(name for name, _ in left_out)} - passed_over
    if keep_duplicates:
        known -= {name for name, reason in left_out if reason.startswith(DUPLICATE)}
    return known, passed_over


def tally_of(store: Datastore) -> Tally:
    """How many images a store went through, and how many of them were bad."""
    return Tally(store.num_images + store.num_duplicates + store.num_bad, store.num_bad)


def spelt_alike(config: DatastoreConfig, known: Collection[StoreSettings]) -> DatastoreConfig:
    """The config, its source spelt as in the first of these settings that mean the same file or folder by theirs."""
    spelt = next((x.source for x in known if is_same_source(x, config.source)), config.source)
    return dataclasses.replace(config, source=spelt)


def split_of(config: DatastoreConfig) -> str:
    """The split of a data set; files have none."""
    return config.split if is_data_set(config.source) else ""


def settings_of(config: DatastoreConfig, tokenizer: Janus, num_images: int) -> StoreSettings:
    """What the store of the first images of the config's source is to hold."""
    return StoreSettings(
        fingerprint=fingerprint(tokenizer),
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
    )


def check(directory: Path) -> None:
    """Reads every file of a store and of its indexes, and says so if all are as they were written."""
    store = Datastore.open(directory)
    store.verify()
    index.verify_indexes(store)
    print(f"datastore {directory} is as it was written: {store.num_images:,} images")


def finish(store: Datastore, config: DatastoreConfig | None, start: float) -> None:
    """Builds the indexes that are wanted and not there, and says what the store holds."""
    kinds, options = store.settings.keys[:1], (ScannOptions(), 1)
    if config is not None:
        kinds, options = config.indexes, (config.scann, config.index_shards)
    for kind in kinds:
        index.refresh_index(store, kind, *options)
    size = sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())
    indexes = f"ScaNN over {', '.join(kinds)} keys" if kinds else "no index"
    told = told_of([x.alone for x in (store, *store.parts)], "that cannot be read", store.num_duplicates)
    wordless = f" ({sum(not words for words in store.captions):,} without caption)" if store.settings.captions else ""
    print(
        f"datastore {store.directory} is complete: {store.num_images:,} images{wordless}{told}, "
        f"{store.num_patches:,} patches, {indexes}, {size:,} bytes, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main_with_config(
        run,
        DatastoreConfig,
        config=Flag("config file, path.py or path.py:argument; --config.key=value overrides a key", ""),
        workdir=Flag("folder of the datastore; made when absent"),
        report=Flag("measure the index in --workdir, print the figures and write them to report.json", False),
        append=Flag("add the images of config.source that the datastore does not hold yet", False),
        merge=Flag("datastore to copy into --workdir; give it several times, in order", ()),
        keep_duplicates=Flag("take files of equal content all, and what --append and --merge find twice", False),
        verify=Flag("read every file in --workdir: exit 0, or the name of the damaged one", False),
    )
