"""Every search over the same stored patches: build time, bytes, recall and time a call, by number of patches.

python benchmarks/retrieval.py [--photos=photos.tar] [--patches=100000,1000000] [--methods=ScaNN,dense]

Stored are code grids of the embedded tokenizer: of scenes, or of random square crops (at least 48 pixels wide, half of
them mirrored, scaled to 48 x 48) of photos in a tar. Queries are contexts of other scenes or photos. Recall goes by
distance, against comparing with every key. "IVF-PQ" is the official index (OPQ8, 4096 lists, PQ8x8; of 256 lists below
a million patches): with one list probed, as its code does, and with as many as it asks for in vain. faiss-cpu is a
development requirement. Calls are those of the host, or of a jitted function, with answers as numpy arrays; medians.
"""

import functools
import io
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

from arrag_jax.data.scenes import render, scene
from arrag_jax.evaluation.pictures import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import contexts_of_grids, next_codes_of_grids
from arrag_jax.retrieval.dense import STORAGES, DenseRetriever
from arrag_jax.retrieval.patches import Patches
from arrag_jax.retrieval.report import TOLERANCE, kth_distances
from arrag_jax.retrieval.scann import build_host

MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
PATCHES = flags.DEFINE_list("patches", ["100000", "1000000", "10000000"], "stored patches")
METHODS = flags.DEFINE_list("methods", ["ScaNN", "dense", "exact", "IVF-PQ"], "which searches")
PHOTOS = flags.DEFINE_string("photos", "", "tar of JPEG files to take crops of; empty: scenes")
GRIDS = flags.DEFINE_string("grids", "", "file that the code grids are kept in for the next run")
SIZE, QUERY_IMAGES, QUERIES, CALLS, SECONDS = 48, 2000, 256, (1, 8, 64), 1.0
NEIGHBORS = (10, 2048)
# Ids [n, k] of contexts [n, 4]
Search = Callable[[np.ndarray, int], np.ndarray]


def crop(photo: bytes, seed: int) -> np.ndarray:
    """A random square of a photo, uint8 [48, 48, 3]."""
    rng, image = np.random.default_rng(seed), Image.open(io.BytesIO(photo)).convert("RGB")
    side = int(rng.integers(SIZE, min(image.size) + 1))
    left, top = (int(rng.integers(0, edge - side + 1)) for edge in image.size)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def code_grids(model: Any, images: int) -> np.ndarray:
    """uint16 [QUERY_IMAGES + images, H, W]: the images of queries first, which come from photos of their own."""
    if GRIDS.value and Path(GRIDS.value).is_file():
        return np.load(GRIDS.value)
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

    grids, total = [], QUERY_IMAGES + images
    for first in range(0, total, 256):
        pictures = np.stack([picture(i) for i in range(first, min(first + 256, total))])
        grids.append(np.asarray(model.encode_images(from_uint8(pictures))[0], np.uint16).reshape(-1, *model.grid))
    if GRIDS.value:
        np.save(GRIDS.value, np.concatenate(grids))
    return np.concatenate(grids)


def scann_search(patches: Patches, codebook: np.ndarray) -> tuple[Search, int]:
    """ScaNN at its default settings."""
    host = build_host(lambda _: patches, len(patches.codes), codebook, 1)
    with_k = functools.cache(host.with_k)
    return lambda context, k: with_k(k).search(context, np.int32(0))[2], host.shards[0].nbytes


def dense_search(patches: Patches, codebook: np.ndarray, storage: str) -> tuple[Search, int]:
    """The search on the device."""
    retriever = DenseRetriever.of(patches, codebook, 1, storage)
    search = jax.jit(lambda retriever, context: retriever.search(context).id)
    with_k = functools.cache(retriever.with_k)
    return lambda context, k: np.asarray(search(with_k(k), context)), sum(
        leaf.nbytes for leaf in jax.tree.leaves(retriever)
    )


def faiss_search(contexts: np.ndarray, codebook: np.ndarray, lists: int, probed: int) -> tuple[Search, int]:
    """FAISS over every patch: exact when ``lists`` is 0, else its IVF-PQ."""
    import faiss

    keys = codebook[contexts].reshape(len(contexts), -1)
    index = faiss.index_factory(keys.shape[1], f"OPQ8,IVF{lists},PQ8x8" if lists else "Flat")
    index.train(keys[np.random.default_rng(0).permutation(len(keys))[: 64 * max(lists, 1024)]])
    index.add(keys)
    if lists:
        faiss.extract_index_ivf(index).nprobe = probed
    size = len(faiss.serialize_index(index))
    return lambda context, k: index.search(codebook[context].reshape(len(context), -1), k)[1], size


def searches(
    contexts: np.ndarray, patches: Patches, codebook: np.ndarray
) -> dict[str, Callable[[], tuple[Search, int]]]:
    """Name → what builds the search and tells the bytes it holds."""
    lists = 256 if len(contexts) < 10**6 else 4096
    made: dict[str, Callable[[], tuple[Search, int]]] = {"ScaNN": lambda: scann_search(patches, codebook)}
    for storage in STORAGES:
        made[f"dense {storage}"] = functools.partial(dense_search, patches, codebook, storage)
    made["exact FAISS"] = lambda: faiss_search(contexts, codebook, 0, 0)
    for probed in (1, lists):
        made[f"IVF-PQ, {probed} of {lists} lists"] = functools.partial(faiss_search, contexts, codebook, lists, probed)
    return {name: make for name, make in made.items() if any(method in name for method in METHODS.value)}


def call_ms(search: Search, context: np.ndarray, together: int, k: int) -> float:
    """Median time of a call of so many queries, after one that may compile."""
    calls, times = [context[i : i + together] for i in range(0, len(context), together)], []
    search(calls[0], k)
    until = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        search(calls[len(times) % len(calls)], k)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main(_: list[str]) -> None:
    """Prints a row as it is measured, then the table."""
    model, sizes = load_model(MODEL), [int(number) for number in PATCHES.value]
    codebook, step = np.asarray(model.codebook), (model.grid[0] - 1) * (model.grid[1] - 2)
    grids, rows = code_grids(model, -(-max(sizes) // step)), []
    asked = contexts_of_grids(grids[:QUERY_IMAGES]).reshape(-1, 4).astype(np.int32)
    asked = asked[np.random.default_rng(0).permutation(len(asked))[:QUERIES]]
    vectors = codebook[asked].reshape(len(asked), -1)
    for size in sizes:
        stored = grids[QUERY_IMAGES : QUERY_IMAGES + -(-size // step)]
        contexts = contexts_of_grids(stored).reshape(-1, 4)[:size]
        start = time.perf_counter()
        patches = Patches.fold(contexts, next_codes_of_grids(stored).reshape(-1)[:size], codebook)
        folding, kth = time.perf_counter() - start, kth_distances([patches], vectors, list(NEIGHBORS))
        print(f"{size:,} patches, {len(patches.keys):,} different contexts, folded in {folding:.1f} s", flush=True)
        for name, make in searches(contexts, patches, codebook).items():
            start = time.perf_counter()
            search, held = make()
            row = [f"{size:,}", name, f"{time.perf_counter() - start:.1f}", f"{held / size:.1f}"]
            for k, farthest in zip(NEIGHBORS, kth, strict=True):
                ids = search(asked, k)
                away = np.square(vectors[:, None] - codebook[contexts[ids]].reshape(*ids.shape, -1)).sum(2)
                row.append(f"{((ids >= 0) & (away <= farthest[:, None] + TOLERANCE)).mean():.4f}")
            row += [f"{call_ms(search, asked, together, k):.2f}" for k in NEIGHBORS for together in CALLS]
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{jax.devices()[0].device_kind}; {'photos' if PHOTOS.value else 'scenes'}; at most {memory:.1f} GiB in use")
    heads = ["patches", "search", "build s", "bytes a patch", *(f"recall@{k}" for k in NEIGHBORS)]
    print(table([*heads, *(f"ms, {n} at K {k}" for k in NEIGHBORS for n in CALLS)], rows))


if __name__ == "__main__":
    app.run(main)
