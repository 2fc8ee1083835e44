"""Compares all searches over the same patches: build time, bytes, recall and time per call, by number of patches.

python benchmarks/retrieval.py [--photos=photos.tar] [--patches=100000,1000000] [--methods=ScaNN,dense]

The patches come from code grids of the embedded tokenizer, either of scenes or of random square crops of photos in a
tar (at least 48 pixels wide, half of them mirrored, scaled to 48 x 48). Queries are contexts of other scenes or photos.
Recall compares distances with those of an exhaustive search. "IVF-PQ" is the official index (OPQ8, 4096 lists, PQ8x8;
256 lists below a million patches). It is measured with one list probed, which is what the official code does in effect,
and with all lists, which its setting requests without effect. faiss-cpu is a development requirement. Times are medians
of calls from the host, or of calls of a jitted function, that return numpy arrays. A second table shows how each figure
grows: the exponent e of N^e between two sizes (1 = proportional).
"""

import functools
import io
import itertools
import math
import resource
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.errors import UserError, run_command
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import contexts_of_grids, next_codes_of_grids
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import Patches
from arrag_jax.retrieval.report import TOLERANCE, kth_distances
from arrag_jax.retrieval.scann import build_host

MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
PATCHES = flags.DEFINE_list("patches", ["100000", "1000000", "10000000"], "stored patches")
METHODS = flags.DEFINE_list("methods", ["ScaNN", "dense", "exact", "IVF-PQ"], "which searches")
PHOTOS = flags.DEFINE_string("photos", "", "tar of JPEG files to take crops of; empty: scenes")
GRIDS = flags.DEFINE_string("grids", "", "file that the code grids are kept in for the next run")
SIZE, QUERY_IMAGES, QUERIES, CALLS = 48, 2000, 256, (1, 8, 64)
SECONDS, SLOW = 0.5, 3.0  # seconds of timing per kind of call; a slower call is timed once
NEIGHBORS = (10, 2048)
# Formats of the figures in a row: build s, bytes per patch, recalls, ms
FORMATS = ("{:.1f}", "{:.1f}", *["{:.4f}"] * len(NEIGHBORS), *["{:.2f}"] * (len(NEIGHBORS) * len(CALLS)))
# Takes contexts [n, 4] and k; returns ids [n, k]
Search = Callable[[np.ndarray, int], np.ndarray]


def crop(photo: bytes, seed: int) -> np.ndarray:
    """Returns a random square of a photo, scaled to uint8 [48, 48, 3]."""
    rng, image = np.random.default_rng(seed), Image.open(io.BytesIO(photo)).convert("RGB")
    side = int(rng.integers(SIZE, min(image.size) + 1))
    left, top = (int(rng.integers(0, edge - side + 1)) for edge in image.size)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def code_grids(model: Any, images: int) -> np.ndarray:
    """Returns uint16 [QUERY_IMAGES + images, H, W]; the grids of queries come first and are from separate photos."""
    total, kind = (
        QUERY_IMAGES + images,
        f"{Path(PHOTOS.value).name or 'scenes'}, tokenizer {model.fingerprint}",
    )
    if GRIDS.value and Path(GRIDS.value).is_file():
        with np.load(GRIDS.value) as kept:
            if str(kept["kind"]) != kind or len(kept["grids"]) < total:
                held = f"{len(kept['grids']):,} grids of {kept['kind']}"
                raise UserError(f"--grids={GRIDS.value} holds {held}, not {total:,} of {kind}; delete it")
            return kept["grids"][:total]
    if PHOTOS.value:
        with tarfile.open(PHOTOS.value) as tar:
            files = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
        apart = len(files) // 10

        def picture(i: int) -> np.ndarray:
            group, j = (files[:apart], i) if i < QUERY_IMAGES else (files[apart:], i - QUERY_IMAGES)
            return crop(group[j % len(group)], i)
    else:

        def picture(i: int) -> np.ndarray:
            return render(scene("valid", i) if i < QUERY_IMAGES else scene("store", i - QUERY_IMAGES))

    grids: Any = []
    for first in range(0, total, 256):
        pictures = np.stack([picture(i) for i in range(first, min(first + 256, total))])
        grids.append(np.asarray(model.encode_images(from_uint8(pictures))[0], np.uint16).reshape(-1, *model.grid))
    grids = np.concatenate(grids)
    if GRIDS.value:
        with open(GRIDS.value, "wb") as file:
            np.savez(file, grids=grids, kind=kind)
    return grids


def scann_search(patches: Patches, codebook: np.ndarray) -> tuple[Search, int]:
    """Returns a search with ScaNN at its default settings, and its bytes."""
    host = build_host(lambda _: patches, len(patches.codes), codebook, 1)
    with_k = functools.cache(host.with_k)
    return lambda context, k: with_k(k).search(context, np.int32(0))[2], host.shards[0].nbytes


def dense_search(patches: Patches, codebook: np.ndarray, storage: str) -> tuple[Search, int]:
    """Returns the dense search on the device, and its bytes."""
    retriever = DenseRetriever.of(patches, codebook, 1, storage)
    search = jax.jit(lambda retriever, context: retriever.search(context).id)
    with_k = functools.cache(retriever.with_k)
    return lambda context, k: np.asarray(search(with_k(k), context)), sum(
        leaf.nbytes for leaf in jax.tree.leaves(retriever)
    )


def faiss_search(index: Callable[[], Any], codebook: np.ndarray, probed: int) -> tuple[Search, int]:
    """Returns a search with FAISS over every patch, and its bytes; probes ``probed`` lists if the index has lists."""
    import faiss

    index = index()
    if probed:
        faiss.extract_index_ivf(index).nprobe = probed
    size = len(faiss.serialize_index(index))
    return lambda context, k: index.search(codebook[context].reshape(len(context), -1), k)[1], size


def faiss_index(contexts: np.ndarray, codebook: np.ndarray, lists: int) -> Any:
    """Returns an exact index if ``lists`` is 0, else IVF-PQ trained as in the official code."""
    import faiss

    keys = codebook[contexts].reshape(len(contexts), -1)
    index = faiss.index_factory(keys.shape[1], f"OPQ8,IVF{lists},PQ8x8" if lists else "Flat")
    index.train(keys[np.random.default_rng(0).permutation(len(keys))[: 40 * max(lists, 1024)]])
    index.add(keys)
    return index


def searches(
    contexts: np.ndarray, patches: Patches, codebook: np.ndarray
) -> dict[str, Callable[[], tuple[Search, int]]]:
    """Returns name → function that builds a search and returns it with its size in bytes."""
    lists = 256 if len(contexts) < 10**6 else 4096
    made: dict[str, Callable[[], tuple[Search, int]]] = {"ScaNN": lambda: scann_search(patches, codebook)}
    for storage in KEY_KINDS["codebook"].storages:
        made[f"dense {storage}"] = functools.partial(dense_search, patches, codebook, storage)
    made["exact FAISS"] = lambda: faiss_search(lambda: faiss_index(contexts, codebook, 0), codebook, 0)
    index = functools.cache(lambda: faiss_index(contexts, codebook, lists))  # built once for both searches
    for name, probed in (("one list", 1), ("all lists", lists)):
        made[f"IVF-PQ, {name}"] = functools.partial(faiss_search, index, codebook, probed)
    return {name: make for name, make in made.items() if any(method in name for method in METHODS.value)}


def call_ms(search: Search, context: np.ndarray, together: int, k: int) -> float:
    """Returns the median time in ms of a call with ``together`` queries.

    The first call, which may compile, does not count unless it is so slow that it stays the only one.
    """
    calls = [context[i : i + together] for i in range(0, len(context), together)]
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 4 or time.perf_counter() < begun + SECONDS:
        start = time.perf_counter()
        search(calls[len(times) % len(calls)], k)
        times.append(time.perf_counter() - start)
        if time.perf_counter() > begun + SLOW:
            break
    return statistics.median(times[1:] or times) * 1e3


def recall(
    search: Search, asked: np.ndarray, contexts: np.ndarray, codebook: np.ndarray, k: int, farthest: np.ndarray
) -> float:
    """Returns the share of the K neighbours that are not farther than the true K-th.

    A slow search is measured with fewer contexts.
    """
    hits, until = [], time.perf_counter() + SLOW
    for first in range(0, len(asked), max(CALLS)):
        if hits and time.perf_counter() > until:
            break
        part = slice(first, first + max(CALLS))
        ids, query = search(asked[part], k), codebook[asked[part]].reshape(-1, 1, 4 * codebook.shape[1])
        away = np.square(query - codebook[contexts[ids]].reshape(*ids.shape, -1)).sum(2)
        hits.append((ids >= 0) & (away <= farthest[part, None] + TOLERANCE))
    return float(np.concatenate(hits).mean())


def growth(measured: dict[str, dict[int, list[float]]]) -> list[list[Any]]:
    """Returns a row per search and pair of successive sizes: the exponents of N with which its figures grow.

    Recall has no exponent.
    """
    rows: list[list[Any]] = []
    for name, by_size in measured.items():
        for (n, before), (more, after) in itertools.pairwise(sorted(by_size.items())):
            grown = [
                math.log(max(y, 1e-3) / max(x, 1e-3)) / math.log(more / n) for x, y in zip(before, after, strict=True)
            ]
            rows.append([f"{n:,} to {more:,}", name, grown[0], grown[1] + 1, *grown[2 + len(NEIGHBORS) :]])
    return rows


def main(_: list[str]) -> None:
    """Prints each row when it is measured, then the tables."""
    model, sizes = load_model(MODEL), [int(number) for number in PATCHES.value]
    codebook, step = np.asarray(model.codebook), (model.grid[0] - 1) * (model.grid[1] - 2)
    grids, rows = code_grids(model, -(-max(sizes) // step)), []
    measured: dict[str, dict[int, list[float]]] = {}
    asked = contexts_of_grids(grids[:QUERY_IMAGES]).reshape(-1, 4).astype(np.int32)
    asked = asked[np.random.default_rng(0).permutation(len(asked))[:QUERIES]]
    for size in sizes:
        stored = grids[QUERY_IMAGES : QUERY_IMAGES + -(-size // step)]
        contexts = contexts_of_grids(stored).reshape(-1, 4)[:size]
        start = time.perf_counter()
        patches = Patches.deduplicate(contexts, next_codes_of_grids(stored).reshape(-1)[:size], codebook)
        deduplicating = time.perf_counter() - start
        kth = kth_distances([patches], codebook[asked].reshape(len(asked), -1), list(NEIGHBORS))
        print(
            f"{size:,} patches, {len(patches.keys):,} different contexts, deduplicated in {deduplicating:.1f} s",
            flush=True,
        )
        for name, make in searches(contexts, patches, codebook).items():
            start = time.perf_counter()
            search, held = make()
            figures = [time.perf_counter() - start, held / size]
            figures += [
                recall(search, asked, contexts, codebook, k, far) for k, far in zip(NEIGHBORS, kth, strict=True)
            ]
            figures += [call_ms(search, asked, together, k) for k in NEIGHBORS for together in CALLS]
            measured.setdefault(name, {})[size] = figures
            rows.append([f"{size:,}", name, *map(str.format, FORMATS, figures)])
            print(*rows[-1], f"{time.perf_counter() - start:.0f} s in all", sep=" | ", flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{jax.devices()[0].device_kind}; {'photos' if PHOTOS.value else 'scenes'}; at most {memory:.1f} GiB in use")
    times = [f"ms, {n} at K {k}" for k in NEIGHBORS for n in CALLS]
    print(table(["patches", "search", "build s", "bytes a patch", *(f"recall@{k}" for k in NEIGHBORS), *times], rows))
    if len(sizes) > 1:
        print(f"\n{table(['patches', 'exponent of', 'build', 'bytes', *times], growth(measured), 2)}")


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
