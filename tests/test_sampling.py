"""Laws of guidance, truncation, the neighbours' distribution and mixing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.ops.neighbors import Neighbors, empty_neighbors
from arrag_jax.ops.sampling import draw, guide, mix, neighbor_log_probs, truncate

V = 11


def random_neighbors(seed: int, batch: int = 5, k: int = 8, empty: int = 2) -> Neighbors:
    """Sorted random neighbours whose last slots are empty; codes repeat."""
    rng = np.random.default_rng(seed)
    code = rng.integers(0, V, (batch, k)).astype(np.int32)
    distance = np.sort(rng.uniform(0, 2, (batch, k)), axis=1).astype(np.float32)
    code[:, k - empty :], distance[:, k - empty :] = -1, np.inf
    return Neighbors(jnp.asarray(code), jnp.asarray(distance), jnp.asarray(code))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_neighbour_distribution_equals_a_dictionary_of_codes(reduction, temperature):
    found = random_neighbors(0)
    ours = np.exp(np.asarray(neighbor_log_probs(found, V, temperature, reduction), np.float64))
    for row in range(5):
        weights = np.zeros(V)
        nearest = float(found.distance[row, 0])
        for code, distance in zip(found.code[row], found.distance[row], strict=True):
            if code >= 0:
                weight = np.exp(-(float(distance) - nearest) / temperature)
                weights[code] = max(weights[code], weight) if reduction == "max" else weights[code] + weight
        np.testing.assert_allclose(ours[row], weights / weights.sum(), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent", "codebook"])
def test_golden_distributions_of_the_reference(reference, kind):
    golden = np.load(reference("retrieval.npz", whole=kind == "latent"))
    found = Neighbors(
        jnp.asarray(golden[f"{kind}_topk_codes"], jnp.int32),
        jnp.asarray(golden[f"{kind}_topk_dist"]),
        jnp.asarray(golden[f"{kind}_topk_ids"], jnp.int32),
    )
    log_p = jnp.log(jnp.asarray(golden["model_probs"]))
    everywhere = jnp.ones(len(log_p), bool)
    for t, temperature in enumerate(golden["temps"]):
        log_q = neighbor_log_probs(found, log_p.shape[1], float(temperature), "max")
        np.testing.assert_allclose(np.exp(log_q), golden[f"{kind}_retr_probs"][t], atol=1e-5)
        for r, weight in enumerate(golden["ratios"]):
            mixed = np.exp(mix(log_p, log_q, float(weight), everywhere))
            np.testing.assert_allclose(mixed, golden[f"{kind}_merged_probs"][t, r], atol=1e-5)


@pytest.mark.slow
def test_no_neighbours_no_distribution():
    assert np.all(np.isneginf(neighbor_log_probs(empty_neighbors(3, 4), V, 0.1, "max")))
    assert np.all(np.isneginf(neighbor_log_probs(empty_neighbors(3, 4), V, 0.1, "sum")))


def test_weight_zero_is_the_model_to_the_bit_and_weight_one_is_the_retrieval():
    log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (5, V)))
    log_p = log_p.at[:, 3].set(-jnp.inf)  # a code that truncation took away
    log_q = neighbor_log_probs(random_neighbors(1), V, 0.1, "max")
    everywhere = jnp.ones(5, bool)
    np.testing.assert_array_equal(mix(log_p, log_q, 0.0, everywhere), log_p)
    np.testing.assert_array_equal(mix(log_p, log_q, 1.0, everywhere), log_q)
    np.testing.assert_array_equal(mix(log_p, log_q, 0.7, ~everywhere), log_p)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_mixtures_sum_to_one(weight):
    log_p = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(1), (5, V)))
    log_q = neighbor_log_probs(random_neighbors(2), V, 0.05, "sum")
    mixed = np.exp(np.asarray(mix(log_p, log_q, weight, jnp.ones(5, bool)), np.float64))
    np.testing.assert_allclose(mixed.sum(1), 1.0, atol=1e-6)


@pytest.mark.slow
def test_guidance_is_linear_and_scale_one_is_the_conditional_row():
    logits = jax.random.normal(jax.random.key(2), (6, V))
    np.testing.assert_allclose(guide(logits, 1.0), logits[:3], atol=1e-6)
    np.testing.assert_allclose(guide(logits, 0.0), logits[3:], atol=1e-6)
    np.testing.assert_allclose(guide(logits, 5.0), logits[3:] + 5 * (logits[:3] - logits[3:]), atol=1e-5)
    np.testing.assert_array_equal(guide(logits, None), logits)


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits = 2 * jax.random.normal(jax.random.key(3), (7, V))
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    kept = np.isfinite(np.asarray(truncate(logits, 1.0, None, top_p)))
    for row in range(7):
        order = np.argsort(-p[row])
        size = int(np.searchsorted(np.cumsum(p[row][order]), top_p - 1e-6) + 1)
        assert set(np.flatnonzero(kept[row])) == set(order[:size])


@pytest.mark.slow
def test_top_k_keeps_the_k_most_probable_in_their_proportions():
    logits = jax.random.normal(jax.random.key(4), (7, V))
    full, cut = np.exp(truncate(logits, 0.7, None, None)), np.exp(truncate(logits, 0.7, 4, None))
    for row in range(7):
        best = np.argsort(-full[row])[:4]
        expected = np.zeros(V)
        expected[best] = full[row][best] / full[row][best].sum()
        np.testing.assert_allclose(cut[row], expected, atol=1e-6)


@pytest.mark.parametrize("options", [(3, None), (None, 0.3), (None, 0.9), (3, 0.9)])
def test_truncation_leaves_a_distribution_in_whatever_it_is_compiled_with(options):
    """Where it follows a product and guidance, XLA may compute log-probabilities twice, with other roundings."""
    weight = jax.random.normal(jax.random.key(0), (32, V))
    compiled = jax.jit(lambda hidden: truncate(guide(hidden @ weight, 1.5), 1.0, *options))
    for seed in range(100):
        log_p = compiled(jax.random.normal(jax.random.key(seed), (2, 32)))
        np.testing.assert_allclose(np.exp(log_p).sum(), 1, atol=1e-5)


def test_draws_follow_their_distribution():
    log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (V,)))
    rows = 20_000
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))
    codes = draw(jnp.tile(log_p, (rows, 1)), keys, jnp.int32(3), greedy=False)
    share = np.bincount(codes, minlength=V) / rows
    deviation = np.sqrt(np.exp(log_p) * (1 - np.exp(log_p)) / rows)
    assert np.all(np.abs(share - np.exp(log_p)) < 5 * deviation)
