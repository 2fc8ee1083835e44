"""Near-ties fall alike everywhere: by exact distance, then by stored row, in every batch, storage, shard and index.

The stores here are made of ties: rows of the codebook that are equal or nearly so, contexts that are permutations of
each other, latents that repeat. A matrix product's last bits would decide them by the shape of the batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from arrag_jax.config import ScannOptions
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid
from arrag_jax.ops import distances
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import KEY_KINDS, TOKENIZER_KINDS
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval import sharded
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import KeysOfRows, Patches
from arrag_jax.retrieval.scann import build_host
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE
from helpers import tiny

V, IMAGES, QUERIES = 24, 100, 2000
RNG = np.random.default_rng(0)


def make_codebook() -> np.ndarray:
    """Rows that are equal, rows a rounding apart, rows whose distances are alike, and others."""
    rows = unit_norm(RNG.normal(size=(V, 8)))
    rows[6:10] = rows[2]  # equal
    rows[10:14] = unit_norm(rows[3] + 3e-8 * RNG.normal(size=(4, 8)))  # nearly equal
    rows[14:18] = [np.roll(rows[4], i) for i in range(4)]
    return rows


CODEBOOK = make_codebook()
GRIDS = RNG.choice(V, (IMAGES, 5, 6), p=np.arange(1, V + 1) ** 2 / (np.arange(1, V + 1) ** 2).sum())
GRIDS[:16] = 23  # plain grounds
CONTEXTS = grid_ops.contexts_of_grids(GRIDS).reshape(-1, 4)
CODES = grid_ops.next_codes_of_grids(GRIDS).reshape(-1)
ROWS = len(CODES)
# Little noise, so that latents repeat, too, and differ by a step of float16 where they do not
MAPS = unit_norm(CODEBOOK[GRIDS] + 5e-4 * RNG.integers(0, 2, (*GRIDS.shape, 1)) * np.eye(8)[0]).astype(np.float16)
INT8 = ScannOptions(exhaustive_below=0, leaves=20, leaves_to_search=20, bytes_a_number=1)  # every leaf is searched
WAYS = [(kind.name, storage) for kind in TOKENIZER_KINDS.values() for storage in kind.storages]
MOST = 128  # the larger of two K


@functools.cache
def queries() -> np.ndarray:
    """Contexts that are stored, permuted, random, and some that are incomplete."""
    stored = CONTEXTS[RNG.integers(0, ROWS, QUERIES // 2)]
    random = RNG.integers(0, V, (QUERIES // 4, 4))
    asked = np.concatenate([stored, stored[: QUERIES // 4, ::-1], random]).astype(np.int32)
    asked[7::97, 1] = -1
    return asked


def patches(kind: str, rows: tuple[int, int] = (0, ROWS)) -> Patches:
    part = slice(*rows)
    if kind == "latent":
        keys = KeysOfRows(KEY_KINDS["latent"], MAPS, CODEBOOK, rows[0], rows[1] - rows[0])
        return Patches(keys, CODES[part].astype(np.uint16))
    return Patches.deduplicate(CONTEXTS[part], CODES[part], CODEBOOK)


@functools.cache
def oracle(kind: str, rounded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, distances and rows of the nearest by whole numbers, then by row; the same rule in plain arithmetic.

    ``rounded``: of keys held in bfloat16.
    """
    keys = patches(kind).keys[:] if kind == "latent" else CODEBOOK[CONTEXTS].reshape(-1, 32)
    keys = keys.astype(jnp.bfloat16) if rounded else keys
    keys, book = np.rint(keys.astype(np.float64) * 2**22), np.rint(CODEBOOK.astype(np.float64) * 2**22)
    shape = QUERIES, MOST
    code, away, row = np.full(shape, -1), np.full(shape, np.inf, np.float32), np.full(shape, -1)
    for i, query in enumerate(queries()):
        if (query >= 0).all():
            total = ((keys - book[query].reshape(-1)) ** 2).sum(1).astype(np.int64)
            high, low = (total >> 22).astype(np.float32), (total & (2**22 - 1)).astype(np.float32)
            distance = (high + low * np.float32(2.0**-22)) * np.float32(2.0**-22)
            row[i] = np.argsort(distance, kind="stable")[:MOST]
            away[i], code[i] = distance[row[i]], CODES[row[i]]
    return code, away, row


@functools.partial(jax.jit, static_argnums=2)
def in_batches(retriever, context, batch: int) -> Neighbors:
    """The search asked batch by batch; the last one is filled up."""
    asked = jnp.pad(context, ((0, -len(context) % batch), (0, 0)))
    found = jax.lax.map(retriever.search, asked.reshape(-1, batch, 4))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[: len(context)], found)


def check(found, kind: str, k: int, storage: str = "") -> None:
    """Latents in bfloat16 are keys of their own; every other storage has the distances of the keys as they are."""
    for ours, true in zip(found, oracle(kind, (kind, storage) == ("latent", "bfloat16")), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), true[:, :k])


def test_the_stores_are_made_of_ties():
    for kind, rounded in (("codebook", False), ("latent", False), ("latent", True)):
        away = oracle(kind, rounded)[1]
        assert (away[:, 15] == away[:, 16]).mean() > 0.1, (kind, rounded)


@pytest.mark.parametrize("numbers", [8, 256])
def test_host_and_device_distances_are_equal_to_the_bit(numbers):
    rng = np.random.default_rng(numbers)
    query = unit_norm(rng.normal(size=(20, 4, numbers))).reshape(20, -1)
    away = np.geomspace(1e-8, 10, 60)[:, None] * rng.normal(size=(20, 60, query.shape[1]))
    key = unit_norm((query[:, None] + away).reshape(20, 60, 4, -1)).reshape(20, 60, -1)
    key[:, 0], key[:, 1] = query, -query
    host = distances.host_distances(query, key)
    np.testing.assert_array_equal(host, jax.jit(distances.squared_distances)(query[:, None], key))
    np.testing.assert_array_equal(host[:, 0], 0)
    exact = ((query[:, None].astype(np.float64) - key) ** 2).sum(2)
    np.testing.assert_allclose(host, exact, atol=distances.score_error(query.shape[1], 4) / 4)
    product = 8 - 2 * np.einsum("ne,nme->nm", query, key)
    assert abs(product - host).max() <= distances.score_error(query.shape[1], 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind, storage", WAYS)
def test_dense_search_in_every_batch(kind, storage):
    retriever = DenseRetriever.of(patches(kind), CODEBOOK, 16, storage)
    for batch in (1, 3, 4, 16):
        check(in_batches(retriever, queries(), batch), kind, 16, storage)
    check(in_batches(retriever.with_k(MOST), queries(), 16), kind, MOST, storage)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codebook", "latent"])
@pytest.mark.parametrize("options", [EXHAUSTIVE, INT8], ids=["float32", "int8"])
def test_scann_search_in_every_batch(kind, options):
    """Every leaf is searched, so that nothing is missed."""
    host = build_host(lambda rows: patches(kind, rows), ROWS, CODEBOOK, 16, options)
    for k in (16, MOST):
        for batch in (50, QUERIES):
            asked = np.array_split(queries(), range(batch, QUERIES, batch))
            found = [host.with_k(k).search(part, np.int32(0)) for part in asked]
            check([np.concatenate(parts) for parts in zip(*found, strict=True)], kind, k)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("kind, storage", [*WAYS, ("codebook", "scann"), ("latent", "scann")])
def test_search_over_shards(kind, storage, shards):
    mesh = jax.make_mesh((shards,), ("store",), (AxisType.Auto,), devices=jax.devices()[:shards])
    part = functools.partial(patches, kind)
    if storage == "scann":
        retriever = sharded.shard_scann(build_host(part, ROWS, CODEBOOK, 16, EXHAUSTIVE, shards), mesh, "store")
    else:
        retriever = sharded.shard_dense(part, ROWS, CODEBOOK, 16, mesh, "store", storage=storage)
    check(jax.jit(lambda r, c: r.search(c))(retriever, queries()), kind, 16, storage)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["codes", "bfloat16"])
def test_more_ties_than_are_kept(storage):
    """All keys at one distance, in several blocks: the lowest rows, whatever their contexts."""
    codebook = np.repeat(np.eye(8, dtype=np.float32)[:1], V, 0)
    fused = Patches.deduplicate(CONTEXTS, CODES, codebook)
    retriever = DenseRetriever.of(fused, codebook, 40, storage, 4 * 5 * 300)
    found = jax.jit(lambda r, c: r.search(c))(retriever, queries()[:5])
    np.testing.assert_array_equal(found.id, np.broadcast_to(np.arange(40), (5, 40)))
    np.testing.assert_array_equal(found.distance, 0)
    host = build_host(lambda _: fused, ROWS, codebook, 40, EXHAUSTIVE)
    np.testing.assert_array_equal(host.search(queries()[:5], np.int32(0))[2], np.broadcast_to(np.arange(40), (5, 40)))


@pytest.mark.slow
def test_pictures_do_not_depend_on_their_batch():
    """Codes are equal; log-probabilities up to the rounding of the backbone's own products."""
    model = tiny.janus(config=tiny.CONFIG)
    prompts, mask = tiny.prompts((4, 6, 5, 6) * 3)
    seeds = np.arange(len(prompts))
    store = tiny.store(model, k=16, images=60)
    policy = Daid(weight=0.4, temperature=0.003)
    draw = functools.partial(sample, model, policy=policy, retriever=store, cfg_scale=2.0)
    alone = [draw(prompts[i : i + 1], seed=seeds[i : i + 1], prompt_mask=mask[i : i + 1]) for i in seeds]
    alone = jax.tree.map(lambda *x: np.concatenate(x), *alone)
    for start in range(0, len(prompts), 4):
        part = slice(start, start + 4)
        drawn = draw(prompts[part], seed=seeds[part], prompt_mask=mask[part])
        for name in ("codes", "source", "rank", "distance"):
            np.testing.assert_array_equal(getattr(drawn, name), getattr(alone, name)[part], err_msg=name)
        for name in ("log_p", "log_p_model"):
            np.testing.assert_allclose(getattr(drawn, name), getattr(alone, name)[part], atol=1e-4)
