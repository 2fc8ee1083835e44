"""The one loader of every training task: shuffled for ever, split over processes, resumable to the example."""

from typing import Any

import grain
import jax
import numpy as np

from arrag_jax.errors import UserError

Batch = dict[str, np.ndarray]  # each [rows of this process, ...]


def make_loader(source: Any, batch_size: int, seed: int, threads: int = 2) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, with ``get_state`` and ``set_state``.

    To the source's own arrays a batch adds "example": int [B], each example's number in the source.
    Every epoch is one pass in its own order. All processes walk the same order, process p of n taking the p-th
    share of every batch, so that a global batch is the same for any number of processes.

    Args:
      source: a ``grain.MapDataset`` (seeded by its maker where it holds random maps) or any random-access
        source (len, []) of dicts of arrays.
      batch_size: examples in the global batch, a multiple of the number of processes.
      seed: of the order.
      threads: that read ahead; the order does not depend on them.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {processes} processes")
    dataset = source if isinstance(source, grain.MapDataset) else grain.MapDataset.source(source)
    examples = len(dataset)
    if examples == 0:
        raise UserError("the training data are empty; check config.data")
    # Past the first epoch grain's index goes on counting, so that random maps differ from epoch to epoch.
    dataset = dataset.map_with_index(lambda index, example: {**example, "example": np.int32(index % examples)})
    dataset = dataset.seed(seed).shuffle().repeat()
    # Whole shares in turn, so that the global batch holds the same examples in the same places.
    dataset = dataset.batch(batch_size // processes)[jax.process_index() :: processes]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))
