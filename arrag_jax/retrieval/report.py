"""Measures a store's index: recall against exact search, speed, and bytes.

The queries are contexts of stored grids mirrored from right to left. The store usually does not hold these contexts,
but they have the statistics of stored ones. Over hidden keys they are the states of the
backbone in such grids. Recall compares distances: a found patch is correct if it is not farther than the K-th patch of
the exact search. It therefore does not matter which of several patches at that distance is found.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from arrag_jax.config import ScannOptions
from arrag_jax.files import write_json
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.ops.keys.hidden import project
from arrag_jax.retrieval.index import index_directory, load_index, saved_shards
from arrag_jax.retrieval.patches import Patches, packed
from arrag_jax.retrieval.remote import RemoteSearch, measured
from arrag_jax.retrieval.scann import HostSearch
from arrag_jax.retrieval.scann_rules import BY_RULE
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.hidden import joined
from arrag_jax.store.hidden_building import Reader

STATE_IMAGES = 32  # images in which a backbone's states are queries
EXCESS = (0.0, 5.0, 20.0, 100.0)  # limits of the ranges of an image's excess, in bits
QUERIES = 256  # number of queries in the measurement of recall
TOGETHER = 64  # queries per call in the measurement of speed
REPEATS = 8  # calls of each kind in the measurement of a share
SECONDS = 2.0  # shortest duration of the measurement of speed
NEIGHBORS = (10, 2048)  # K of the two recalls; capped at the number of stored patches
TOLERANCE = 1e-5  # distances that differ by at most this count as equal
BLOCK = 2**16  # keys per block of the exact search
BLOCK_IMAGES = 4096  # images per block of the search for known contexts


def indexed(store: Datastore) -> list[str]:
    """Returns the kinds of key over which the store has an index; if there is no index, the store's first kind."""
    return [kind for kind in store.settings.keys if index_directory(store, kind).exists()] or [store.settings.keys[0]]


def report(
    store: Datastore,
    options: ScannOptions = BY_RULE,
    kind: str = "",
    query: Int[np.ndarray, "n 4"] | Float[np.ndarray, "n E"] | None = None,
) -> dict[str, float | int]:
    """Measures a saved index, writes the figures into the store's folder, and returns them.

    The file is ``report.json`` for the first kind of ``indexed``, and ``report-KIND.json`` for the others.

    Args:
      store: the store of the index.
      options: the options of the index.
      kind: the kind of key; "" = the first kind of ``indexed``.
      query: what is searched for; None = ``held_out_contexts``.

    Returns:
      recall_at_10, recall_at_2048: share of the K nearest patches that the index finds; K is at most N.
      queries_per_second: speed in calls of 64 queries, at K = 10.
      bytes_per_patch: memory of the search (keys, leaves, contexts, posting lists, codes) per stored patch.
      num_patches, num_images, num_bad: stored patches and images, and images left out as unreadable.

    Raises:
      UserError: if there is no index, it does not fit, or it is damaged.
    """
    first = indexed(store)[0]
    kind = kind or first
    shards = saved_shards(store, kind)
    rows = store.num_rows(kind)
    ks = [min(k, rows) for k in NEIGHBORS]
    host = load_index(store, kind, ks[0], options, shards)
    query = held_out_contexts(store) if query is None else query
    patches = [host.shards[shard].patches for shard in range(shards)]
    farthest = kth_distances(patches, patches[0].kind.query(host.table, query), ks)
    recall = [recall_of(host.with_k(k), query, kth) for k, kth in zip(ks, farthest, strict=True)]
    figures = {
        "recall_at_10": recall[0],
        "recall_at_2048": recall[1],
        "queries_per_second": queries_per_second(host, query),
        "bytes_per_patch": sum(part.nbytes for part in host.shards.values()) / rows,
        "num_patches": rows,
        "num_images": store.num_shown,
        "num_bad": store.num_bad,
    }
    write_json(Path(store.directory) / ("report.json" if kind == first else f"report-{kind}.json"), figures)
    return figures


def report_shares(store: Datastore, search: RemoteSearch, kind: str) -> tuple[dict[str, float | int], list[dict]]:
    """Measures a search that is spread over machines, writes what it finds to report-ray-KIND.json, and returns it.

    Returns:
      Figures as in ``report``, without recall, which needs all keys in one process, and with ``milliseconds``, the
      median time of a call; and for each share its ``node``, ``bytes``, ``rows`` and ``ms`` (``remote.measured``).
    """
    context = held_out_contexts(store)
    calls = [context[first : first + TOGETHER] for first in range(0, len(context), TOGETHER)]
    nodes = measured(search, REPEATS * calls)
    times: list[float] = []
    while sum(times) < SECONDS:
        start = time.perf_counter()
        search.search(calls[len(times) % len(calls)], np.int32(0))
        times.append(time.perf_counter() - start)
    figures = {
        "queries_per_second": len(context) / len(calls) / float(np.mean(times)),
        "milliseconds": 1000 * float(np.median(times)),
        "bytes_per_patch": sum(node["bytes"] for node in nodes) / search.bounds[0][1],
        "num_patches": store.num_patches,
        "num_images": store.num_images,
    }
    write_json(Path(store.directory) / f"report-ray-{kind}.json", {**figures, "nodes": nodes})
    return figures, nodes


def held_out_contexts(store: Datastore) -> Int[np.ndarray, "n 4"]:
    """Returns up to ``QUERIES`` contexts of stored grids mirrored from right to left, sampled with a fixed seed.

    Contexts that the store holds are left out, unless it holds all of them. Such contexts occur because a uniform
    background equals its mirror image.
    """
    rng = np.random.default_rng(0)
    images = rng.permutation(store.num_images)
    images = images[:QUERIES] if store.shown is None else images[store.shown[images]][:QUERIES]
    contexts = grid_ops.contexts_of_grids(store.codes[images][:, :, ::-1].astype(np.int32)).reshape(-1, 4)
    contexts = contexts[rng.permutation(len(contexts))]
    known, wanted = np.zeros(len(contexts), bool), packed(contexts)
    for first in range(0, store.num_images, BLOCK_IMAGES):
        known |= np.isin(
            wanted, packed(grid_ops.contexts_of_grids(store.codes[first : first + BLOCK_IMAGES]).reshape(-1, 4))
        )
    return (contexts if known.all() else contexts[~known])[:QUERIES]


def held_out_states(store: Datastore, reader: Reader) -> Float[np.ndarray, "n E"]:
    """Returns up to ``QUERIES`` projected states of the backbone in mirrored grids, sampled with a fixed seed.

    Args:
      store: a store with hidden keys of the backbone.
      reader: runs the backbone.
    """
    rng = np.random.default_rng(0)
    images = rng.permutation(store.num_images)[:STATE_IMAGES]
    codes = store.codes[images][:, :, ::-1].reshape(len(images), -1)
    known = list(reader.read(codes, [store.captions[i] for i in images.tolist()]))
    states = np.concatenate([each.states for each in known])
    queries = project(store.table(HIDDEN.name), states.reshape(-1, states.shape[-1]))
    return queries[rng.permutation(len(queries))[:QUERIES]]


def excess_by_source(store: Datastore) -> dict[str, list[int]]:
    """Returns for each source of a store's images how many of them have an excess in each range of ``EXCESS``.

    The numbers of a source are those of images with at most ``EXCESS[0]`` bits, of those above with at most
    ``EXCESS[1]``, and so on; the last one counts the images above all limits. The source is the part of an image's id
    before the last "/".
    """
    told = joined(folder.told() for folder in store.hidden)
    ranges = np.searchsorted(EXCESS, told.mean_excess * told.excess.shape[1])
    names = [source.rpartition("/")[0] for source in store.sources]
    counts = {name: [0] * (len(EXCESS) + 1) for name in names}
    for name, place in zip(names, ranges.tolist(), strict=True):
        counts[name][place] += 1
    return counts


def kth_distances(
    parts: Iterable[Patches], query: Float[np.ndarray, "n E"], ks: list[int]
) -> list[Float[np.ndarray, " n"]]:
    """Returns, for each K in ``ks``, each query's distance to its K-th nearest patch, by comparison with every key."""
    most = max(ks)
    near: np.ndarray = np.full((len(query), 0), np.inf, np.float32)
    count: np.ndarray = np.zeros((len(query), 0), np.int64)
    for part in parts:
        members = (part.codes >= 0).astype(np.int64) if part.starts is None else np.diff(part.starts)
        for first in range(0, len(part.keys), BLOCK):
            block = slice(first, first + BLOCK)
            distance = np.maximum(part.kind.distance(part.kind.scores(query, part.keys[block])), 0)
            near = np.concatenate([near, np.where(members[block] > 0, distance, np.inf)], 1)
            count = np.concatenate([count, np.broadcast_to(members[block], distance.shape)], 1)
            if near.shape[1] > most:  # enough, because every context at a finite distance has a patch
                kept = np.argpartition(near, most - 1, 1)[:, :most]
                near, count = (np.take_along_axis(x, kept, 1) for x in (near, count))
    order = np.argsort(near, 1)
    near, upto = (np.take_along_axis(near, order, 1), np.cumsum(np.take_along_axis(count, order, 1), 1))
    return [np.take_along_axis(near, np.argmax(upto >= k, 1)[:, None], 1)[:, 0] for k in ks]


def recall_of(
    host: HostSearch, query: Int[np.ndarray, "n 4"] | Float[np.ndarray, "n E"], kth: Float[np.ndarray, " n"]
) -> float:
    """Returns the share of K neighbours that are not farther than the exact search's K-th neighbour."""
    found = np.concatenate([host.search(query, np.int32(shard))[1] for shard in host.shards], 1)
    return float((np.sort(found, 1)[:, : host.k] <= kth[:, None] + TOLERANCE).mean())


def queries_per_second(host: HostSearch, query: Int[np.ndarray, "n 4"] | Float[np.ndarray, "n E"]) -> float:
    """Returns how many queries per second all shards answer, in calls of ``TOGETHER`` queries."""
    calls = [query[first : first + TOGETHER] for first in range(0, len(query), TOGETHER)]
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        for call in calls:
            for shard in host.shards:
                host.search(call, np.int32(shard))
            done += len(call)
    return done / (time.perf_counter() - start)
