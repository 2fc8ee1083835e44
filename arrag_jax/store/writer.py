"""Builds a datastore shard by shard (``building.build``), without the images that cannot be read."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from arrag_jax.data.examples import DUPLICATE, Examples, caption_of
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.progress import Bar
from arrag_jax.store import building
from arrag_jax.store.datastore import CODEBOOK, Datastore, StoreSettings
from arrag_jax.store.encoding import Encode, encoded, require_images
from arrag_jax.store.identity import KnownContents, digests
from arrag_jax.store.skipped import NONE, SkippedCounts, SkippedImages
from arrag_jax.store.workers import Workers

# Codes have spare bits (10 to 14 of 16 are in use), which zstd finds; where there are none it adds next to nothing.
# Grouped, for ArrayRecord adds 9 bytes a record else; it adds 128 KiB a file in any case, so that a store stays within
# 5 % of 2 bytes a code from 2.5 MiB of codes on whatever they are, and from 0.3 MiB on if 9 bits of 16 are in use.
RECORD_OPTIONS = "group_size:512,zstd"
IsNew = Callable[[np.ndarray, Sequence[str] | None], np.ndarray]  # codes [n, H, W], captions → bool [n]


def build(
    directory: str | Path,
    examples: Examples,
    encode: Encode,
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    batch_size: int,
    source_id: Callable[[int], str] | None = None,
    max_bad_fraction: float = 0.0,
    workers: Workers | None = None,
    others: SkippedCounts = NONE,
    min_bad: int = 0,
    known: KnownContents | None = None,
) -> Datastore:
    """Builds the store in ``directory``, or goes on with it, or finds it whole.

    Args:
      directory: made if absent.
      examples: at least ``settings.num_images`` (any, if the store is whole); the first ones are taken.
      encode: called with batches of exactly ``batch_size`` (a shard's last one is padded with zeros).
      codebook: rows of unit norm.
      settings: what to build.
      batch_size: images a call of ``encode``.
      source_id: image number → one line that tells where it came from; default "source/split/number".
      max_bad_fraction: share of bad images above which the build fails.
      workers: the processes that build it together; None = this one alone.
      others: images of the store that this one is to be a part of; they count in the share of bad ones.
      min_bad: as ``SkippedImages.least``.
      known: contents that are left out as duplicates; None = whatever comes is taken.

    Raises:
      UserError: too few images or too many bad ones, a code outside the codebook; else as ``building.build``.
    """
    directory = Path(directory)
    if building.require_same_settings(Datastore, directory, settings) != "whole":
        require_images(examples, settings)
    _require_codebook(codebook, settings)
    source_id = source_id or (lambda i: f"{settings.source}/{settings.split}/{i}")

    def write_codebook() -> None:
        with atomic_write(directory / CODEBOOK) as temporary, open(temporary, "wb") as file:
            np.savez(file, codebook=np.asarray(codebook, np.float32))

    left_out = SkippedImages(directory, settings, source_id, max_bad_fraction, min_bad, others)

    def write_shard(shard: int, bar: Bar) -> None:
        bad, skip = left_out.of_shard(shard, bar)
        batches = encoded(examples, settings.shard_images(shard), encode, batch_size, settings, skip)
        files = settings.shard_files(shard)
        write_files(directory, files, batches, bar, _is_new(known, left_out, shard, bad))
        building.write_lines(directory / files["sources"], left_out.write(shard, bad))
        left_out.require_few()

    return building.build(Datastore, directory, settings, write_shard, write_codebook, left_out.require_few, workers)


def _require_codebook(codebook: np.ndarray, settings: StoreSettings) -> None:
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")


def _is_new(known: KnownContents | None, left_out: SkippedImages, shard: int, bad: dict[int, str]) -> IsNew:
    """Tells of one batch of a shard after another which images are none of the known; notes the others as bad."""
    going = iter(left_out.settings.shard_images(shard))

    def is_new(codes: np.ndarray, captions: Sequence[str] | None) -> np.ndarray:
        if known is None:
            return np.ones(len(codes), bool)
        numbers = list(itertools.islice((number for number in going if number not in bad), len(codes)))
        names = known.find(digests(codes, captions))
        same = {number: name for number, name in zip(numbers, names, strict=True) if name is not None}
        bad.update((number, left_out.line(number, f"{DUPLICATE}{name}")) for number, name in same.items())
        return np.array([name is None for name in names], bool)

    return is_new


def write_files(
    directory: Path,
    files: dict[str, str],
    batches: Iterator,
    bar: Bar,
    is_new: IsNew = lambda codes, _: np.ones(len(codes), bool),
) -> None:
    """Writes those of a shard's files of codes, latents and captions whose names are given, each whole or not at all.

    Args:
      files: as of ``StoreSettings.shard_files``; "sources" is left to others.
      batches: as of ``encoding.encoded``.
      bar: told of every image.
      is_new: from the codes of a batch and its captions to which of its images are taken.
    """
    records = {kind: [] for kind in KEY_KINDS.values() if kind.file in files}
    captions: list[str] = []
    for batch, codes, latents in batches:
        words = [caption_of(example) for example in batch] if "captions" in files else None
        new = is_new(codes, words)
        for kind, made in records.items():
            made += [record.tobytes() for record in kind.records(codes[new], latents[new])]
        if words is not None:
            captions += itertools.compress(words, new)
        bar.update(len(batch))
    for kind, made in records.items():
        building.write_records(directory / files[kind.file], made, RECORD_OPTIONS)
    if "captions" in files:
        building.write_lines(directory / files["captions"], captions)
