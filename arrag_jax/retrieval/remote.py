"""Search of a store that is spread over the machines of a Ray cluster: each share is searched where it is held.

A share is a range of stored rows. A search asks all shares and merges their answers by distance, then by stored row.
Distances are equal to the bit in every batch and on every machine, so the answer is that of a search in one process.
This module uses only numpy where it is called from compiled programs.
"""

import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from arrag_jax.ray_shares import Shares
from arrag_jax.retrieval.dense import DenseRetriever, require_k
from arrag_jax.retrieval.patches import no_neighbors
from arrag_jax.retrieval.scann import HostSearch
from arrag_jax.work import Report

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, distances and stored rows, [B, k]


class Held(NamedTuple):
    """What a share holds: bytes and stored rows."""

    bytes: int
    rows: int


class Answer(NamedTuple):
    """A share's answer, and the seconds that its search took."""

    found: Found
    seconds: float


@runtime_checkable
class ShareSearch(Protocol):
    """The search of one share; its rows count from the store's first."""

    held: Held

    def search(self, context: np.ndarray, k: int) -> Found:
        """Returns the k nearest patches of each context, or fewer if the share holds fewer."""


class ScannShare:
    """Neighbouring shards of a ScaNN index; a ``ShareSearch``."""

    def __init__(self, host: HostSearch):
        self._host = host
        rows = sum(host.bounds[shard][1] - host.bounds[shard][0] for shard in host.shards)
        self.held = Held(sum(shard.nbytes for shard in host.shards.values()), rows)

    def search(self, context: np.ndarray, k: int) -> Found:
        """See ``ShareSearch``."""
        parts = []
        for shard in self._host.shards:
            code, distance, row = self._host.search(context, np.int32(shard), k)
            parts.append((code, distance, np.where(row >= 0, row + self._host.bounds[shard][0], -1)))
        return merged(parts, k)


class DenseShare:
    """An exact search over a range of rows; a ``ShareSearch``."""

    def __init__(self, retriever: DenseRetriever, first: int):
        self._retriever, self._first = retriever, first
        self.held = Held(sum(leaf.nbytes for leaf in jax.tree.leaves(retriever)), len(retriever.codes))

    def search(self, context: np.ndarray, k: int) -> Found:
        """See ``ShareSearch``."""
        found = _dense(self._retriever.with_k(min(k, self.held.rows)), context)
        code, distance, row = map(np.asarray, found)
        return code, distance, np.where(row >= 0, row + self._first, -1)


@jax.jit
def _dense(retriever: DenseRetriever, context: Any) -> Any:
    return retriever.search(context)


class ShareWorker:
    """Answers with what a share finds; a worker of ``ray_shares``."""

    def __init__(self, search: ShareSearch):
        self._search = search

    def __call__(self, item: tuple[np.ndarray, int] | None, report: Report) -> Answer | Held:
        """Returns the answer for contexts and k; of None, what is held."""
        if item is None:
            return self._search.held
        start = time.perf_counter()
        return Answer(self._search.search(*item), time.perf_counter() - start)


def merged(parts: list[Found], k: int) -> Found:
    """Returns the k nearest among the answers of shares, by distance and then by stored row."""
    if len(parts) == 1 and parts[0][0].shape[1] == k:
        return parts[0]
    code, distance, row = (np.concatenate(columns, 1) for columns in zip(*parts, strict=True))
    order = np.lexsort((row, distance))[:, :k]
    found = no_neighbors(len(code), k)
    for slots, new in zip(found, (code, distance, row), strict=True):
        slots[:, : order.shape[1]] = np.take_along_axis(new, order, 1)
    return found


class RemoteSearch:
    """A ``HostSearch`` whose shards are on other machines; ``ScannRetriever`` calls it in the same way.

    Args:
      shares: what answers; its workers are ``ShareWorker``.
      rows: number of stored patches.
      k: neighbours per query.
      index_hash: as in ``HostSearch``.

    Raises:
      UserError: if k is not in 1..``rows``.
    """

    def __init__(self, shares: Shares, rows: int, k: int, index_hash: str = ""):
        require_k(k, rows)
        self.shares, self.bounds, self.k, self.index_hash = shares, [(0, rows)], k, index_hash

    def with_k(self, k: int) -> "RemoteSearch":
        """Returns the same search for another number of neighbours; errors as in the constructor."""
        return RemoteSearch(self.shares, self.bounds[0][1], k, self.index_hash)

    def search(self, context: Any, shard: Any, k: int | None = None) -> Found:
        """Returns codes, distances and stored rows [*batch, K]; K = ``k`` or self.k."""
        del shard  # there is one: the whole store
        context, k = np.asarray(context), self.k if k is None else k
        answers = self.shares.ask((context.reshape(-1, context.shape[-1]), k))
        code, distance, row = merged([answer.found for answer in answers], k)
        shape = (*context.shape[:-1], k)
        return code.reshape(shape), distance.reshape(shape), row.reshape(shape)


def measured(search: RemoteSearch, calls: list[np.ndarray]) -> list[dict[str, Any]]:
    """Returns, for each share, its machine, bytes and rows, and the median milliseconds of its searches.

    Args:
      calls: contexts that are searched together.
    """
    held = search.shares.ask(None)
    answers = [search.shares.ask((call, search.k)) for call in calls]
    times = np.median([[answer.seconds for answer in each] for each in answers], 0)
    return [
        {"node": host, "bytes": each.bytes, "rows": each.rows, "ms": float(1000 * seconds)}
        for host, each, seconds in zip(search.shares.hosts.values(), held, times, strict=True)
    ]
