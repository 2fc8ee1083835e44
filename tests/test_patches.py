"""Deduplicating contexts changes nothing: every search over unique contexts is the naive search over patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from arrag_jax.config import RetrievalConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import sharded
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import KeysOfRows, Patches
from arrag_jax.retrieval.scann import ScannRetriever, build_host
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE

V, K = 12, 40
CODEBOOK = unit_norm(np.random.default_rng(0).normal(size=(V, 8)))
# Distances of these codes are whole numbers: exact in float32, and many contexts tie.
HALVES = np.array(
    [np.roll([0.5, s, 0, t, 0.5, 0, 0, 0], i) for s in (0.5, -0.5) for t in (0.5, -0.5) for i in (0, 1, 2)]
)
HALVES = HALVES.astype(np.float32)
# Codes are drawn unevenly, so that some contexts have hundreds of patches and others one.
GRIDS = np.random.default_rng(1).choice(V, (400, 5, 6), p=np.arange(1, V + 1) ** 3 / 6084)
CONTEXTS = grid_ops.contexts_of_grids(GRIDS).reshape(-1, 4)
CODES = grid_ops.next_codes_of_grids(GRIDS).reshape(-1)
STORAGES = KEY_KINDS["codebook"].storages
INT8 = ScannOptions(exhaustive_below=0, leaves=20, leaves_to_search=20, bytes_a_number=1)  # every leaf is searched


def queries() -> np.ndarray:
    """Contexts that many, few and no stored patches have, and one that is incomplete."""
    drawn = np.random.default_rng(2).choice(V, (60, 4), p=np.arange(1, V + 1) ** 2 / 650)
    return np.concatenate([drawn, CONTEXTS[:20], [[0, 0, 0, 0], [3, -1, 2, 1]]]).astype(np.int32)


def fused(rows: tuple[int, int] = (0, len(CODES)), codebook: np.ndarray = CODEBOOK) -> Patches:
    return Patches.deduplicate(CONTEXTS[slice(*rows)], CODES[slice(*rows)], codebook)


def latent_keys(maps: np.ndarray, first: int, count: int) -> KeysOfRows:
    return KeysOfRows(KEY_KINDS["latent"], maps, CODEBOOK, first, count)


def naive(context: np.ndarray, k: int, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and distances of the k nearest patches; at equal distance by row."""
    rows, away = [], []
    for query in context:
        distance = ((codebook[query][None] - codebook[CONTEXTS]) ** 2).sum((1, 2), dtype=np.float64)
        order = np.lexsort((np.arange(len(CODES)), distance))[:k]
        rows.append(order)
        away.append(distance[order])
    return np.array(rows), np.array(away)


def check(found, context: np.ndarray, k: int, codebook: np.ndarray = CODEBOOK, ids: bool = False) -> None:
    """The naive search's distances, at patches that have them; ``ids``: its very patches."""
    code, distance, id_ = (np.asarray(x) for x in found)
    whole = (context >= 0).all(1)
    assert (code[~whole] == -1).all() and (id_[~whole] == -1).all() and np.isposinf(distance[~whole]).all()
    rows, away = naive(context[whole], k, codebook)
    code, distance, id_ = code[whole], distance[whole], id_[whole]
    np.testing.assert_allclose(distance, away, atol=2e-5)
    np.testing.assert_array_equal(code, CODES[id_])
    assert all(len(set(row)) == k for row in id_)
    mine = ((codebook[context[whole]][:, None] - codebook[CONTEXTS[id_]]) ** 2).sum((2, 3))
    np.testing.assert_allclose(distance, mine, atol=2e-5)
    if ids:
        np.testing.assert_array_equal(id_, rows)


def search(retriever, context: np.ndarray):
    return jax.jit(lambda retriever, context: retriever.search(context))(retriever, jnp.asarray(context))


def test_every_patch_is_in_the_posting_list_of_its_context():
    patches = fused()
    assert len(patches.keys) < len(CODES) / 2
    unique = np.repeat(np.arange(len(patches.keys)), np.diff(patches.starts))
    np.testing.assert_array_equal(patches.contexts[unique], CONTEXTS[patches.rows])
    np.testing.assert_array_equal(patches.codes, CODES[patches.rows])
    np.testing.assert_array_equal(np.sort(patches.rows), np.arange(len(CODES)))
    assert all((np.diff(rows) > 0).all() for rows in np.split(patches.rows, patches.starts[1:-1]))
    np.testing.assert_array_equal(patches.keys[:], CODEBOOK[patches.contexts].reshape(-1, 32))


@pytest.mark.parametrize("k", [1, K, len(CODES)])
@pytest.mark.parametrize("options", [EXHAUSTIVE, INT8], ids=["float32", "int8"])
@pytest.mark.parametrize("codebook", [CODEBOOK, HALVES], ids=["normal", "halves"])
def test_scann_over_unique_contexts_is_the_naive_search(codebook, options, k):
    """With int8 too: its rounding is bounded, so that nothing nearer is left out. Where ties are exact, to the id."""
    context = queries() if k <= K else queries()[::8]
    host = build_host(lambda rows: fused(rows, codebook), len(CODES), codebook, k, options)
    check(search(ScannRetriever.of(host), context), context, k, codebook, ids=codebook is HALVES)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k, score_bytes", [(1, 2**20), (K, 2**20), (K, 4 * 82 * 900), (700, 2**20)])
def test_dense_over_unique_contexts_is_the_naive_search(storage, k, score_bytes):
    """In one block and in several."""
    context = queries()
    check(search(DenseRetriever.of(fused(), CODEBOOK, k, storage, score_bytes), context), context, k)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["codes", "float32"])
def test_dense_orders_ties_by_row(storage):
    context = queries()
    retriever = DenseRetriever.of(fused(codebook=HALVES), HALVES, K, storage, 4 * len(context) * 900)
    check(search(retriever, context), context, K, HALVES, ids=True)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["scann", *STORAGES])
def test_sharded_over_unique_contexts_is_the_naive_search(storage):
    """Shards have different numbers of unique contexts; the batch is sharded over another axis at the same time."""
    mesh = jax.make_mesh((2, 4), ("data", "store"), axis_types=(AxisType.Auto,) * 2)
    context = queries()
    if storage == "scann":
        retriever = sharded.shard_scann(
            build_host(fused, len(CODES), CODEBOOK, K, EXHAUSTIVE, 4), mesh, "store", "data"
        )
    else:
        retriever = sharded.shard_dense(fused, len(CODES), CODEBOOK, K, mesh, "store", "data", storage)
    check(search(retriever, context), context, K)


def test_a_process_holds_its_own_shards_alone():
    asked = []

    def patches(rows: tuple[int, int]) -> Patches:
        asked.append(rows)
        return fused(rows)

    host = build_host(patches, len(CODES), CODEBOOK, K, EXHAUSTIVE, shards=4, local=[2])
    assert list(host.shards) == [2] and asked == [host.bounds[2]]
    whole = queries()[:-1]
    alone = build_host(lambda _: fused(host.bounds[2]), len(CODES) // 4, CODEBOOK, K, EXHAUSTIVE)
    for ours, theirs in zip(host.search(whole, np.int32(2)), alone.search(whole, np.int32(0)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_answer_does_not_depend_on_its_batch():
    host = build_host(fused, len(CODES), CODEBOOK, K, INT8)
    context = queries()
    together = host.search(context, np.int32(0))
    for i in range(0, len(context), 7):
        for ours, alone in zip(together, host.search(context[i : i + 1], np.int32(0)), strict=True):
            np.testing.assert_array_equal(ours[i], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scann", "bfloat16"])
def test_rounded_latents_find_what_is_near(kind):
    """ScaNN recomputes distances from the float16 maps; bfloat16 from its own rounded keys."""
    rng = np.random.default_rng(3)
    maps = unit_norm(CODEBOOK[GRIDS] + 0.15 * rng.normal(size=(*GRIDS.shape, 8))).astype(np.float16)
    patches = Patches(latent_keys(maps, 0, len(CODES)), CODES.astype(np.uint16))
    context = queries()[:-1]
    true = ((CODEBOOK[context].reshape(-1, 1, 32) - patches.keys[:][None]) ** 2).sum(2)
    if kind == "scann":
        retriever = ScannRetriever.of(build_host(lambda _: patches, len(CODES), CODEBOOK, K, INT8))
    else:
        retriever = DenseRetriever.of(patches, CODEBOOK, K, kind)
    found = search(retriever, context)
    away = np.take_along_axis(true, np.asarray(found.id), 1)
    kth = np.sort(true, 1)[:, K - 1 : K]
    recall = (away <= kth + 1e-5).mean()
    assert recall >= {"scann": 1.0, "bfloat16": 0.97}[kind], recall
    np.testing.assert_allclose(found.distance, away, atol={"scann": 1e-5, "bfloat16": 0.02}[kind])


def test_a_part_of_the_latents_is_its_rows():
    maps = unit_norm(np.random.default_rng(4).normal(size=(7, 5, 6, 8))).astype(np.float16)
    whole, part = latent_keys(maps, 0, 7 * 16), latent_keys(maps, 21, 50)
    np.testing.assert_array_equal(part[:], whole[21:71])
    np.testing.assert_array_equal(part[np.array([[3, 0], [49, 7]])], whole[np.array([[24, 21], [70, 28]])])


def test_what_an_index_of_unique_contexts_holds():
    """A context takes its codes, its start and its place by context, a patch a row and a code: 16 U + 6 N + 4."""
    patches = fused()
    assert patches.nbytes == 16 * len(patches.keys) + 6 * len(CODES) + 4


def test_codes_are_held_of_contexts_alone():
    one_each = Patches(CODEBOOK[CONTEXTS].reshape(-1, 32), CODES)
    for storage in ("codes", "int8"):
        message = rf"storage='{storage}' .* keys='latent'; choose float32 or bfloat16"
        with pytest.raises(UserError, match=message):
            DenseRetriever.of(one_each, CODEBOOK, K, storage)
        with pytest.raises(UserError, match=message):
            RetrievalConfig("store", keys="latent", storage=storage)
    with pytest.raises(UserError, match="float64"):
        DenseRetriever.of(one_each, CODEBOOK, K, "float64")
    with pytest.raises(UserError, match="bytes_a_number=2"):
        ScannOptions(bytes_a_number=2)
