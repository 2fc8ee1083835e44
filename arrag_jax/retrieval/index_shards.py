"""Builds the ScaNN searchers of an index, one for each of its shards; ``index`` keeps them and reads them."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from arrag_jax.config import ScannOptions
from arrag_jax.files import atomic_folder
from arrag_jax.retrieval.patches import stored_patches
from arrag_jax.retrieval.scann import build_searcher, shard_bounds
from arrag_jax.store.datastore import Datastore
from arrag_jax.work import Engine, Opened, Report, run_work


def write_shards(
    places: Sequence[Path], store: Datastore, kind: str, options: ScannOptions, engine: Engine
) -> list[int]:
    """Builds the searcher of each shard in its folder, and returns the number of unique contexts of each.

    Args:
      places: the folders of all shards, in order.
      store: a complete store; its manifest need not name the last segment yet.
      kind: the kind of key.
      options: options of the searchers.
      engine: where they are built.
    """
    folders = [segment.directory for segment in store.segments]
    opened = Opened(functools.partial(_opened, store.directory, folders, store.backbone), store)
    build = functools.partial(_ShardBuilder, places, opened, kind, options)
    sizes, label = dict.fromkeys(range(len(places)), 1), f"indexing {kind} keys"
    entries = dict(run_work(range(len(places)), build, sizes, label, unit="shard", kept=False, engine=engine))
    return [entries[shard] for shard in sizes]


@dataclasses.dataclass(frozen=True)
class _ShardBuilder:
    """Builds the searcher of a shard, by its number; a worker of ``work``."""

    places: Sequence[Path]
    store: Opened[Datastore]
    kind: str
    options: ScannOptions

    def __call__(self, shard: int, report: Report) -> int:
        store = self.store()
        # only one shard's float32 keys are in memory at a time, which bounds the memory of a build
        patches = stored_patches(store, self.kind, shard_bounds(store.num_rows(self.kind), len(self.places))[shard])
        with atomic_folder(self.places[shard], "a shard of an index", replace=True) as place:
            # an index with absolute paths does not load after it is moved
            build_searcher(patches, self.options).serialize(str(place), relative_path=True)
        report.count(1)
        return len(patches.keys)


def _opened(directory: Path, folders: Sequence[Path], backbone: str) -> Datastore:
    """Returns the store of the first segment in ``directory`` and of the others in ``folders``."""
    first, segments = Datastore.open(directory).alone, tuple(map(Datastore.open, folders))
    number = sum(segment.num_images for segment in (first, *segments))
    return dataclasses.replace(first, segments=segments, num_images=number, backbone=backbone)
