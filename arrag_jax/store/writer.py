"""Builds the two kinds of folder of shards, a datastore and a neighbour set: the loops over what is to be written."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from arrag_jax.data.examples import DUPLICATE, BadImage, Example, Examples, caption_of
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.store import building
from arrag_jax.store.building import Shard
from arrag_jax.store.datastore import CODEBOOK, Datastore, StoreSettings
from arrag_jax.store.encoding import Batch, EncodedImages
from arrag_jax.store.identity import KnownContents, digests
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings, to_record
from arrag_jax.store.skipped import NO_BAD, SkipLimit
from arrag_jax.store.workers import Workers

# Codes have spare bits (10 to 14 of 16 are in use), which zstd finds; where there are none it adds next to nothing.
# Grouped, for ArrayRecord adds 9 bytes a record else; it adds 128 KiB a file in any case, so that a store stays within
# 5 % of 2 bytes a code from 2.5 MiB of codes on whatever they are, and from 0.3 MiB on if 9 bits of 16 are in use.
RECORD_OPTIONS = "group_size:512,zstd"
# One record a group, as random access wants it; 3 to 4 times smaller than uncompressed, for neighbours agree.
NEIGHBOR_RECORD_OPTIONS = "group_size:1,zstd"
NO_CAPTION = "it has no caption"
# int [B, H, W] codes, where the images came from, what to tell of images done → [B·M, K]
Search = Callable[[np.ndarray, Sequence[str], Callable[[int], Any]], Neighbors]


def build_datastore(
    directory: str | Path,
    images: EncodedImages,
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    limit: SkipLimit = NO_BAD,
    workers: Workers | None = None,
    known: KnownContents | None = None,
) -> Datastore:
    """Builds the store in ``directory``, or goes on with it, or finds it whole.

    Args:
      codebook: rows of unit norm.
      known: contents that are left out as duplicates; None = whatever comes is taken.
      others: as ``building.begun``.

    Raises:
      UserError: a code outside the codebook; else as ``building.begun``.
    """
    directory = Path(directory)
    _require_codebook(codebook, settings)
    with building.begun(Datastore, directory, images, settings, limit, workers) as build:
        if build.leads:
            _write_codebook(directory / CODEBOOK, codebook)
        for shard in build.pending():
            contents: dict[str, list[Any]] = {kind: [] for kind in shard.files if kind != "sources"}
            for batch in shard.batches():
                taken = batch if known is None else _without_known(batch, known, shard)
                for kind, items in contents.items():
                    items += items_of(kind, taken)
                shard.count(len(batch.numbers))
            for kind, items in contents.items():
                write_file(shard.files[kind], kind, items)
            write_file(shard.files["sources"], "sources", shard.write_left_out())
    return Datastore.open(directory)


def build_neighbor_set(
    directory: str | Path,
    images: EncodedImages,
    search: Search,
    settings: NeighborSettings,
    limit: SkipLimit = NO_BAD,
) -> NeighborSet:
    """Builds the set in ``directory``, or goes on with it, or finds it whole.

    A shard's images are searched for together, which is quicker the more they are. All depends on the shard
    alone, so that a resumed build gives the same bytes as long as ``search`` gives the same answers (a ScaNN
    tree made anew does not: it starts at random). An image without a caption is a bad one: FAiD learns from both.

    Args:
      images: with "caption" beside "image".
      search: of the store and by the means that ``settings`` tell.
      others: as ``building.begun``.

    Raises:
      UserError: a code outside the codebook; else as ``building.begun``.
    """
    directory = Path(directory)
    images = EncodedImages(_Captioned(images.examples), images.source_id, images.encode, images.batch_size)
    with building.begun(NeighborSet, directory, images, settings, limit) as build:
        for shard in build.pending():
            codes: list[np.ndarray] = []
            captions: list[str] = []
            records: Iterable[bytes] = []
            for batch in shard.batches():
                codes.append(batch.codes)
                captions += batch.captions
            names = shard.write_left_out()
            if names:
                grids = np.concatenate(codes)
                found = np.asarray(search(grids, names, shard.count).code)
                neighbors = neighbors_of_positions(found, settings.grid)
                records = map(to_record, grids.reshape(len(grids), -1), neighbors, map(str.encode, captions))
            building.write_records(shard.files["neighbors"], records, NEIGHBOR_RECORD_OPTIONS)
    return NeighborSet.open(directory)


def items_of(kind: str, batch: Batch) -> list[bytes] | list[str]:
    """What a batch puts into a shard's file of this kind of content: ``KeyKind.file`` or "captions"."""
    for key in KEY_KINDS.values():
        if key.file == kind:
            return [record.tobytes() for record in key.records(batch.codes, batch.latents)]
    return batch.captions


def write_file(path: Path, kind: str, items: Iterable[Any]) -> None:
    """Writes a file of a store's shard, whole or not at all: records that keys are made of, else lines."""
    if kind in (key.file for key in KEY_KINDS.values()):
        building.write_records(path, items, RECORD_OPTIONS)
    else:
        building.write_lines(path, items)


def _require_codebook(codebook: np.ndarray, settings: StoreSettings) -> None:
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")


def _write_codebook(path: Path, codebook: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, codebook=np.asarray(codebook, np.float32))


def _without_known(batch: Batch, known: KnownContents, shard: Shard) -> Batch:
    """The images of a batch that are none of the known; the shard leaves out the others."""
    captions = batch.captions if "captions" in shard.files else None
    names = known.find(digests(batch.codes, captions))
    for number, name in zip(batch.numbers, names, strict=True):
        if name is not None:
            shard.leave_out(number, f"{DUPLICATE}{name}")
    return batch.of(np.array([name is None for name in names], bool))


class _Captioned:
    """Examples with their captions as they are kept; those without one are bad."""

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


def neighbors_of_positions(code: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Codes [B·M, K] of the cells that have a context → int32 [B, T, K] of all cells, -1 in the others."""
    positions = grid_ops.positions_with_context(*grid)
    found = np.full((len(code) // len(positions), grid[0] * grid[1], code.shape[1]), -1, np.int32)
    found[:, positions] = code.reshape(-1, len(positions), code.shape[1])
    return found
