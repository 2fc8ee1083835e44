"""Law 3: ScaNN (exhaustive) = dense = their sharded forms = a naive search, up to ties at the K-th distance."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Retriever
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.retrieval import dense, sharded
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import one_key_each
from arrag_jax.retrieval.scann import ScannRetriever, build_host
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE, num_leaves
from helpers.stored import keys_of_maps

K = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A small store: keys of one kind, and queries of which two have no context."""

    keys: np.ndarray
    codes: np.ndarray
    codebook: np.ndarray
    context: np.ndarray


def make_case(kind: str, seed: int = 0, images: int = 60) -> Case:
    """12 codes only, so that with kind "codebook" contexts repeat and ties abound."""
    rng = np.random.default_rng(seed)
    codebook = unit_norm(rng.normal(size=(12, 8)))
    grids = rng.choice(12, (images, 5, 6), p=np.arange(1, 13) / 78)
    noise = rng.normal(size=(images, 5, 6, 8)) * (0.3 if kind == "latent" else 0.0)
    keys = keys_of_maps(unit_norm(codebook[grids] + noise))
    context = rng.integers(0, 12, (7, 4)).astype(np.int32)
    context[2, 3] = context[5, :] = -1
    return Case(keys, grid_ops.next_codes_of_grids(grids).reshape(-1).astype(np.int32), codebook, context)


def distances(case: Case) -> np.ndarray:
    """Oracle: float64 ‖q − k‖² of every query with every key."""
    query = case.codebook[case.context].reshape(len(case.context), -1).astype(np.float64)
    return ((query[:, None] - case.keys[None].astype(np.float64)) ** 2).sum(-1)


def check(case: Case, found, k: int = K) -> None:
    """What every exact search must give: the k smallest distances, ids that have them, their codes."""
    has_context = (case.context >= 0).all(1)
    code, distance, id_ = (np.asarray(x) for x in found)
    assert (code[~has_context] == -1).all() and (id_[~has_context] == -1).all()
    assert np.isposinf(distance[~has_context]).all()
    code, distance, id_, true = code[has_context], distance[has_context], id_[has_context], distances(case)[has_context]
    np.testing.assert_allclose(distance, np.sort(true, 1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(distance, np.take_along_axis(true, id_, 1), atol=1e-5)
    assert (np.diff(distance, axis=1) >= 0).all()
    assert all(len(set(row)) == k for row in id_)
    np.testing.assert_array_equal(code, case.codes[id_])


def search(retriever: Retriever, context: np.ndarray):
    return jax.jit(lambda retriever, context: retriever.search(context))(retriever, jnp.asarray(context))


def mesh(shape: tuple[int, ...], names: tuple[str, ...]):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codebook", "latent"])
@pytest.mark.parametrize("score_bytes", [dense.SCORE_BYTES, 4 * 7 * 100])
def test_dense_is_the_naive_search(kind, score_bytes):
    case = make_case(kind)
    retriever = DenseRetriever.create(case.keys, case.codes, case.codebook, K, score_bytes)
    assert isinstance(retriever, Retriever)
    check(case, search(retriever, case.context))


@pytest.mark.slow
def test_dense_orders_ties_by_lower_id():
    rng = np.random.default_rng(1)
    codebook = np.eye(8, dtype=np.float32)
    grids = rng.integers(0, 2, (80, 5, 6))  # keys of 0 and 1: scores are exact, ties exact too
    case = Case(
        keys_of_maps(codebook[grids]),
        grid_ops.next_codes_of_grids(grids).reshape(-1).astype(np.int32),
        codebook,
        rng.integers(0, 2, (5, 4)).astype(np.int32),
    )
    expected = np.argsort(distances(case), 1, kind="stable")[:, :20]
    for score_bytes in (dense.SCORE_BYTES, 4 * 5 * 97):
        found = search(DenseRetriever.create(case.keys, case.codes, codebook, 20, score_bytes), case.context)
        np.testing.assert_array_equal(found.id, expected)


@pytest.mark.slow
@pytest.mark.parametrize("n, k", [(31, 3), (4096, 1), (1000, 7), (1025, 32), (5000, 100)])
def test_two_stage_top_k_is_top_k(n, k):
    rng = np.random.default_rng(n)
    for scores in (rng.normal(size=(3, n)), rng.integers(0, 4, (3, n)), np.full((3, n), -np.inf)):
        scores = jnp.asarray(scores, jnp.float32)
        for ours, theirs in zip(dense.exact_top_k(scores, k), jax.lax.top_k(scores, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["codebook", "latent"])
def test_exhaustive_scann_is_the_naive_search(kind):
    case = make_case(kind)
    retriever = ScannRetriever.create(case.keys, case.codes, case.codebook, K, EXHAUSTIVE)
    assert isinstance(retriever, Retriever)
    check(case, search(retriever, case.context))


@pytest.mark.parametrize("kind", ["codebook", "latent"])
def test_scann_that_searches_every_leaf_is_the_naive_search(kind):
    """A tree loses nothing but the leaves it does not search."""
    case = make_case(kind)
    options = ScannOptions(exhaustive_below=0, leaves=20, leaves_to_search=20)
    check(case, search(ScannRetriever.create(case.keys, case.codes, case.codebook, K, options), case.context))


@pytest.mark.slow
def test_scann_recall_with_default_options():
    """Keys crowd around the contexts of 60 codes; of 200 queries' ten nearest at least 95 % are found, exactly."""
    rng = np.random.default_rng(0)
    codebook = unit_norm(rng.normal(size=(60, 8)))
    weights = np.arange(1, 61) ** 3.0
    grids = rng.choice(60, (2000, 5, 6), p=weights / weights.sum())
    keys = keys_of_maps(unit_norm(codebook[grids] + 0.1 * rng.normal(size=(*grids.shape, 8))))
    context = rng.choice(60, (200, 4), p=weights / weights.sum()).astype(np.int32)
    case = Case(keys, grid_ops.next_codes_of_grids(grids).reshape(-1).astype(np.int32), codebook, context)
    assert num_leaves(len(case.codes), ScannOptions()) > 0
    found = search(ScannRetriever.create(case.keys, case.codes, case.codebook, 10), case.context)
    true = 8 - 2 * case.codebook[context].reshape(200, -1) @ keys.T
    away = np.take_along_axis(true, np.asarray(found.id), 1)
    recall = (away <= np.partition(true, 9, 1)[:, 9:10] + 1e-5).mean()
    assert recall >= 0.95, recall
    np.testing.assert_allclose(found.distance, away, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("k, score_bytes", [(10, 2**19), (100, 2**13)])
def test_scores_stay_within_their_budget(k, score_bytes):
    """All scores would take 2.2 MB; also where fewer fit into a block than there are neighbours."""
    case = make_case("latent", images=500)
    retriever = DenseRetriever.create(case.keys, case.codes, case.codebook, k, score_bytes)
    context = jnp.asarray(np.tile(case.context, (10, 1)))
    compiled = jax.jit(lambda retriever, context: retriever.search(context)).lower(retriever, context).compile()
    found = 4 * len(context) * k * (case.keys.shape[1] + 16)  # keys of what was found, and the lists of it
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * score_bytes + found  # as they are, masked, in chunks
    check(case, jax.tree.map(lambda x: x[:7], compiled(retriever, context)), k)


def test_on_a_tpu_the_top_k_is_approximate():
    """Lowered for a TPU on this machine."""
    case = make_case("latent")
    retriever = DenseRetriever.create(case.keys, case.codes, case.codebook, K)
    search_all = jax.jit(lambda retriever, context: retriever.search(context))
    programs = {
        platform: jax.export.export(search_all, platforms=[platform])(
            retriever, jnp.asarray(case.context)
        ).mlir_module()
        for platform in ("tpu", "cpu")
    }
    assert "ApproxTopK" in programs["tpu"] and f"recall_target = {dense.TPU_RECALL:.6e}" in programs["tpu"]
    assert "ApproxTopK" not in programs["cpu"]


def test_scann_misses_are_empty():
    """A leaf with fewer members than k: the rest is empty, never id 0 or NaN."""
    case = make_case("latent")
    options = ScannOptions(exhaustive_below=0, leaves=200, leaves_to_search=1)
    k = 600
    code, distance, id_ = map(
        np.asarray, search(ScannRetriever.create(case.keys, case.codes, case.codebook, k, options), case.context)
    )
    empty = id_ == -1
    assert empty.any() and (~empty).any()
    np.testing.assert_array_equal(code == -1, empty)
    np.testing.assert_array_equal(np.isposinf(distance), empty)
    assert not np.isnan(distance).any()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in id_)


def test_scann_under_vmap_and_grad():
    case = make_case("latent")
    retriever = ScannRetriever.create(case.keys, case.codes, case.codebook, 4, EXHAUSTIVE)
    stacked = jnp.asarray(np.stack([case.context, case.context[::-1]]))
    both = jax.jit(jax.vmap(retriever.search))(stacked)
    for i in range(2):
        for ours, alone in zip(jax.tree.map(lambda x, i=i: x[i], both), search(retriever, stacked[i]), strict=True):
            np.testing.assert_array_equal(ours, alone)
    asked = case.context[[0, 1]]
    gradient = jax.grad(lambda x: (x * search(retriever, asked).distance).sum())(2.0)
    np.testing.assert_allclose(gradient, np.sort(distances(case), 1)[:2, :4].sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["codebook", "latent"])
@pytest.mark.parametrize("images", [60, 6])  # 6 images: 12 rows a shard, fewer than k
def test_sharded_searches_are_the_naive_search(kind, images):
    case = make_case(kind, images=images)
    grid = mesh((8,), ("store",))
    check(
        case,
        search(
            sharded.shard_dense(one_key_each(case.keys, case.codes), len(case.codes), case.codebook, K, grid, "store"),
            case.context,
        ),
    )
    host = build_host(one_key_each(case.keys, case.codes), len(case.codes), case.codebook, K, EXHAUSTIVE, shards=8)
    check(case, search(sharded.shard_scann(host, grid, "store"), case.context))


@pytest.mark.slow
def test_sharded_dense_is_dense():
    """Ids too: rows are sharded in order, so ties fall the same way."""
    case = make_case("latent")
    one = search(DenseRetriever.create(case.keys, case.codes, case.codebook, K), case.context)
    grid = mesh((8,), ("store",))
    many = search(
        sharded.shard_dense(one_key_each(case.keys, case.codes), len(case.codes), case.codebook, K, grid, "store"),
        case.context,
    )
    np.testing.assert_array_equal(one.id, many.id)
    np.testing.assert_array_equal(one.code, many.code)


@pytest.mark.slow
def test_store_and_batch_sharded_together():
    case = make_case("codebook")
    case = dataclasses.replace(case, context=np.concatenate([case.context, case.context[:1]]))
    grid = mesh((2, 4), ("data", "store"))
    found = sharded.shard_dense(
        one_key_each(case.keys, case.codes), len(case.codes), case.codebook, K, grid, "store", "data"
    )
    check(case, search(found, case.context))
    host = build_host(one_key_each(case.keys, case.codes), len(case.codes), case.codebook, K, EXHAUSTIVE, shards=4)
    check(case, search(sharded.shard_scann(host, grid, "store", "data"), case.context))


def test_wrong_sizes_are_user_errors():
    case = make_case("latent", images=2)
    rows = len(case.codes)
    for make in (DenseRetriever.create, ScannRetriever.create):
        with pytest.raises(UserError, match=f"k={rows + 1}"):
            make(case.keys, case.codes, case.codebook, rows + 1)
    host = build_host(one_key_each(case.keys, case.codes), len(case.codes), case.codebook, 2, EXHAUSTIVE, shards=2)
    with pytest.raises(UserError, match="2 shards"):
        sharded.shard_scann(host, mesh((8,), ("store",)), "store")
    with pytest.raises(UserError, match="leaves=-1"):
        ScannOptions(leaves=-1)


def test_absent_scann_names_the_dense_search(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    case = make_case("latent", images=2)
    with pytest.raises(UserError, match="dense"):
        ScannRetriever.create(case.keys, case.codes, case.codebook, 2)


@pytest.mark.parametrize("kind", ["latent", "codebook"])
@pytest.mark.parametrize("make", [DenseRetriever.create, ScannRetriever.create], ids=["dense", "scann"])
def test_reference_search(reference, kind, make):
    golden = np.load(reference("retrieval.npz", whole=kind == "latent"))
    codebook, codes = golden["codebook_normalised"], golden["next_codes"]
    maps = golden["grid_latents"] if kind == "latent" else codebook[golden["grid_codes"]]
    keys, k = keys_of_maps(maps), int(golden["top_k"])
    first = golden[f"{kind}_keys_first100"]
    np.testing.assert_allclose(keys[: len(first)], first, atol=1e-6)
    np.testing.assert_array_equal(grid_ops.next_codes_of_grids(golden["grid_codes"]).reshape(-1), codes)
    found = search(make(keys, codes, codebook, k), golden["query_codes"].astype(np.int32))
    np.testing.assert_allclose(found.distance, golden[f"{kind}_topk_dist"], atol=1e-5)
    if kind == "latent":
        np.testing.assert_array_equal(found.id, golden["latent_topk_ids"])
        np.testing.assert_array_equal(found.code, golden["latent_topk_codes"])
    else:  # equal distances inside the top k are ordered differently
        np.testing.assert_array_equal(np.sort(found.id, 1), np.sort(golden["codebook_topk_ids"], 1))
        np.testing.assert_array_equal(np.sort(found.code, 1), np.sort(golden["codebook_topk_codes"], 1))
