"""The loader of every training task: endless, shuffled, split over processes, and resumable at any batch."""

from typing import Any

import grain
import jax
import numpy as np

from arrag_jax.errors import UserError

Batch = dict[str, np.ndarray]  # each [rows of this process, ...]


def make_loader(source: Any, batch_size: int, seed: int, threads: int = 2) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator of batches, with ``get_state`` and ``set_state``.

    A batch has the arrays of the source and "example": int [B], the number of each example in the source. Every epoch
    is one pass over the source in a new order. All processes follow the same order, and process p of n takes the p-th
    share of every batch. So the global batch is the same for any number of processes.

    Args:
      source: a ``grain.MapDataset`` (its random maps, if any, already have a seed), or any random-access source
        (``len`` and ``[]``) of dicts of arrays.
      batch_size: examples in the global batch; a multiple of the number of processes.
      seed: seed of the order.
      threads: number of threads that read ahead; the order does not depend on it.

    Raises:
      UserError: if the source is empty, or ``batch_size`` is no multiple of the number of processes.
    """
    processes = jax.process_count()
    if batch_size % processes:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {processes} processes")
    dataset = source if isinstance(source, grain.MapDataset) else grain.MapDataset.source(source)
    examples = len(dataset)
    if examples == 0:
        raise UserError("the training data are empty; check config.data")
    # grain's index continues to count after the first epoch, so that random maps differ between epochs.
    dataset = dataset.map_with_index(lambda index, example: {**example, "example": np.int32(index % examples)})
    dataset = dataset.seed(seed).shuffle().repeat()
    # Processes take contiguous shares in turn, so the global batch has the same examples in the same order.
    dataset = dataset.batch(batch_size // processes)[jax.process_index() :: processes]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))
