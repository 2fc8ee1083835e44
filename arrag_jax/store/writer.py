"""Builds the two kinds of folder of shards, a datastore and a neighbour set: the loops over shards and batches."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from arrag_jax.data.examples import DUPLICATE, BadImage, Example, Examples, caption_of
from arrag_jax.data.stated_rights import line_of, rights_of_example
from arrag_jax.errors import UserError
from arrag_jax.ops.keys import KEY_KINDS, KINDS_BY_FILE
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.store import building
from arrag_jax.store.building import Shard
from arrag_jax.store.datastore import CODEBOOK, Datastore, StoreSettings
from arrag_jax.store.encoding import Batch, EncodedImages
from arrag_jax.store.identity import KnownContents, digests
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings, to_record
from arrag_jax.store.record_files import write_array
from arrag_jax.store.skipped import NO_BAD, SkipLimit
from arrag_jax.work import HERE, Engine, Opened

# zstd removes the unused bits of codes (10 to 14 of 16 are in use); without unused bits it adds next to nothing.
# Records are grouped, because ArrayRecord otherwise adds 9 bytes per record. It always adds 128 KiB per file. A store
# thus takes at most 5 % more than 2 bytes per code from 2.5 MiB of codes on, or from 0.3 MiB if 9 of 16 bits are used.
RECORD_OPTIONS = "group_size:512,zstd"
# One record per group gives fast random access. zstd makes it 3 to 4 times smaller, because neighbours often agree.
NEIGHBOR_RECORD_OPTIONS = "group_size:1,zstd"
NO_CAPTION = "it has no caption"
# (int [B, H, W] codes, ids and captions of the images, callback that counts finished images) → neighbours [B·M, K]
Search = Callable[[np.ndarray, Sequence[str], Sequence[str], Callable[[int], Any]], Neighbors]


def build_datastore(
    directory: str | Path,
    images: EncodedImages | Opened[EncodedImages],
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    limit: SkipLimit = NO_BAD,
    engine: Engine = HERE,
    known: KnownContents | None = None,
) -> Datastore:
    """Builds the store in ``directory`` and returns it; resumes an unfinished build, and keeps a complete store.

    Args:
      directory, images, settings, limit, engine: as in ``building.begun``.
      codebook: rows of unit norm.
      known: contents that are left out as duplicates; None = every image is stored.

    Raises:
      UserError: if a code lies outside the codebook, or as in ``building.begun``.
    """
    directory = Path(directory)
    _require_codebook(codebook, settings)
    with building.begun(Datastore, directory, images, settings, limit, engine) as build:
        if build.leads:
            write_array(directory / CODEBOOK, "codebook", codebook)
        build.write(functools.partial(_write_store_shard, known))
    return Datastore.open(directory)


def _write_store_shard(known: KnownContents | None, shard: Shard) -> None:
    contents: dict[str, list[Any]] = {kind: [] for kind in shard.files if kind != "sources"}
    for batch in shard.batches():
        taken = batch if known is None else _without_known(batch, known, shard)
        for kind, items in contents.items():
            items += items_of(kind, taken)
        shard.count(len(batch.numbers))
    for kind, items in contents.items():
        write_file(shard.files[kind], kind, items)
    write_file(shard.files["sources"], "sources", shard.write_left_out())


def build_neighbor_set(
    directory: str | Path,
    images: EncodedImages | Opened[EncodedImages],
    search: Search | Opened[Search],
    settings: NeighborSettings,
    limit: SkipLimit = NO_BAD,
    engine: Engine = HERE,
) -> NeighborSet:
    """Builds the set in ``directory`` and returns it; resumes an unfinished build, and keeps a complete set.

    All images of a shard are searched together, because large searches are faster. The result depends only on the
    shard, so that a resumed build writes the same bytes as long as ``search`` gives the same answers. An image without
    a caption is a bad image, because FAiD trains on images and captions.

    Args:
      directory, settings, limit, engine: as in ``building.begun``.
      images: examples with "image" and "caption".
      search: must search the store and use the options that ``settings`` name.

    Raises:
      UserError: if a code lies outside the codebook, or as in ``building.begun``.
    """
    directory = Path(directory)
    images = Opened(functools.partial(captioned, images)) if isinstance(images, Opened) else captioned(images)
    search = search if isinstance(search, Opened) else Opened(None, search)
    with building.begun(NeighborSet, directory, images, settings, limit, engine) as build:
        build.write(functools.partial(_write_neighbor_shard, search))
    return NeighborSet.open(directory)


def _write_neighbor_shard(search: Opened[Search], shard: Shard) -> None:
    codes: list[np.ndarray] = []
    captions: list[str] = []
    records: Iterable[bytes] = []
    for batch in shard.batches():
        codes.append(batch.codes)
        captions += batch.captions
    names = shard.write_left_out()
    if names:
        grids = np.concatenate(codes)
        found, settings = np.asarray(search()(grids, names, captions, shard.count).code), shard.settings
        assert isinstance(settings, NeighborSettings)
        neighbors = neighbors_of_positions(found, settings.grid, settings.keys)
        records = map(to_record, grids.reshape(len(grids), -1), neighbors, map(str.encode, captions))
    building.write_records(shard.files["neighbors"], records, NEIGHBOR_RECORD_OPTIONS)


def items_of(kind: str, batch: Batch) -> list[bytes] | list[str]:
    """Returns a batch's items for a shard's file of this kind of content, a key of ``StoreSettings.shard_files``."""
    if kind == "rights_lines":
        return [line_of(rights_of_example(example)) for example in batch.examples]
    if kind not in KINDS_BY_FILE:
        return batch.captions
    return [record.tobytes() for record in KINDS_BY_FILE[kind].records(batch.codes, batch.latents)]


def write_file(path: Path, kind: str, items: Iterable[Any]) -> None:
    """Writes one file of a store's shard atomically: ArrayRecord for a ``KeyKind.file``, else a text file."""
    if kind in KINDS_BY_FILE:
        building.write_records(path, items, RECORD_OPTIONS)
    else:
        building.write_lines(path, items)


def _require_codebook(codebook: np.ndarray, settings: StoreSettings) -> None:
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")


def _without_known(batch: Batch, known: KnownContents, shard: Shard) -> Batch:
    """Returns the batch without the known images; the shard records those as duplicates."""
    captions = batch.captions if "captions" in shard.files else None
    names = known.find(digests(batch.codes, captions))
    for number, name in zip(batch.numbers, names, strict=True):
        if name is not None:
            shard.leave_out(number, f"{DUPLICATE}{name}")
    return batch.of(np.array([name is None for name in names], bool))


def captioned(images: EncodedImages | Opened[EncodedImages]) -> EncodedImages:
    """Returns the images with captions as they are stored; those without a caption are bad images."""
    images = images() if isinstance(images, Opened) else images
    return EncodedImages(_Captioned(images.examples), images.source_id, images.encode, images.batch_size)


class _Captioned:
    """Examples with captions as they are stored; an example without a caption is a bad image."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        caption = caption_of(example)
        if not caption:
            raise BadImage(NO_CAPTION)
        return {**example, "caption": caption}


def neighbors_of_positions(code: np.ndarray, grid: tuple[int, int], keys: str) -> np.ndarray:
    """Returns the neighbours of all positions, int32 [B, T, K]; -1 at positions without a key.

    Args:
      code: codes [B·M, K] of the M positions per image that have a key.
      grid: [H, W].
      keys: the kind of key.
    """
    positions = KEY_KINDS[keys].positions(grid)
    found = np.full((len(code) // len(positions), grid[0] * grid[1], code.shape[1]), -1, np.int32)
    found[:, positions] = code.reshape(-1, len(positions), code.shape[1])
    return found
