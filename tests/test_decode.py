"""Laws of the decode loop: teacher forcing, causality, batches, policies, and the reference's own drawings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax.config import SamplingConfig
from arrag_jax.decode.loop import decode, image_keys, sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops import grid
from arrag_jax.ops.sampling import guide, truncate
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.scann import ScannRetriever
from helpers import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.janus()


@pytest.fixture(scope="module")
def retriever(model):
    return tiny.store(model)


def teacher_forced_log_p(model, ids, mask, codes, cfg_scale):
    """The oracle: distributions of drawn codes from two whole passes, guided."""
    condition = model.check_condition(ids, mask)
    cond, uncond = (model.score(each, codes) for each in (condition, model.unconditional(condition)))
    logits = guide(jnp.concatenate([cond, uncond]).reshape(-1, cond.shape[-1]), cfg_scale)
    return truncate(logits, 1.0, None, None).reshape(cond.shape)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "daid"])
def test_step_by_step_equals_teacher_forcing(model, retriever, method):
    policy = Plain() if method == "plain" else Daid(0.4, 0.3)
    ids, mask = tiny.prompts((3, 6, 4))
    drawn = sample(model, ids, policy, retriever, cfg_scale=2.0, prompt_mask=mask, seed=3, return_log_probs=True)
    log_p = teacher_forced_log_p(model, ids, mask, drawn.codes, 2.0)
    if method == "daid":
        positions = grid.context_positions(*model.grid)
        contexts = np.where(positions[None] >= 0, np.asarray(drawn.codes)[:, positions], -1)
        flat = log_p.reshape(-1, log_p.shape[-1])
        found = retriever.search(jnp.asarray(contexts.reshape(-1, 4), jnp.int32))
        log_p = policy.log_probs(flat, found, jnp.asarray(True)).reshape(log_p.shape)
    np.testing.assert_allclose(drawn.log_probs, log_p, atol=1e-5)
    its_own = np.take_along_axis(np.asarray(drawn.log_probs), np.asarray(drawn.codes)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(drawn.log_p, its_own)


@pytest.mark.slow
def test_no_future_code_reaches_a_past_distribution(model):
    ids, mask = (jnp.asarray(x) for x in tiny.prompts((4,)))
    codes = jnp.zeros((1, 20), jnp.int32)

    def logits_of(inputs):
        """Logits of each cell when ``inputs`` [T, D] is added to the embeddings of the codes."""
        filled = jnp.ones((1, 4 + 19), bool)
        x = jnp.concatenate([model.language_model.embed_tokens(ids), model.embed_codes(codes[:, :-1])], axis=1)
        x = x.at[0, 4:].add(inputs[:-1])
        positions = jnp.arange(23)[None]
        return model.gen_head(model.language_model.forward(x, positions, filled, model.grid)[0][0, 3:]).sum(-1)

    influence = np.abs(jax.jit(jax.jacobian(logits_of))(jnp.zeros((20, 16)))).sum(-1)  # [cell, code put in]
    assert mask.all()
    assert np.all(influence[np.triu_indices(20)] == 0.0)  # a code is no input of its own cell or an earlier one
    assert np.all(influence[np.tril_indices(20, -1)] > 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_weight_zero_draws_plain_to_the_bit(model, retriever, reduction):
    ids, mask = tiny.prompts((5, 2))
    plain = sample(model, ids, prompt_mask=mask, seed=1)
    daid = sample(model, ids, Daid(0.0, 0.1, reduction), retriever, prompt_mask=mask, seed=1)
    np.testing.assert_array_equal(plain.codes, daid.codes)
    np.testing.assert_array_equal(plain.log_p, daid.log_p)


@pytest.mark.slow
def test_weight_one_draws_retrieved_codes_only(model, retriever):
    ids, mask = tiny.prompts((5, 2, 3))
    drawn = sample(model, ids, Daid(1.0, 0.5), retriever, prompt_mask=mask)
    tiny.assert_retrieved(drawn, model, retriever)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "daid"])
def test_a_batch_equals_its_pictures_drawn_alone(model, retriever, method):
    policy = Plain() if method == "plain" else Daid(0.5, 0.2, "sum")
    ids, mask = tiny.prompts((6, 3, 3, 6))
    seeds = np.array([7, 7, 1, 2])
    batch = sample(model, ids, policy, retriever, cfg_scale=3.0, prompt_mask=mask, seed=seeds)
    for i in range(4):
        alone_ids = ids[i : i + 1, int((~mask[i]).sum()) :]
        alone = sample(model, alone_ids, policy, retriever, cfg_scale=3.0, seed=seeds[i : i + 1])
        np.testing.assert_array_equal(batch.codes[i], alone.codes[0])
        np.testing.assert_allclose(batch.log_p[i], alone.log_p[0], atol=1e-5)


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws(model, retriever):
    ids, mask = tiny.prompts((4,) * 8)
    alone = sample(model, ids, Daid(0.3, 0.2), retriever, prompt_mask=mask)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    cond = jax.device_put((jnp.asarray(ids), jnp.asarray(mask)), over)
    keys = jax.device_put(image_keys(0, 8), over)
    graph, state = nnx.split(model)
    uncond = jax.jit(lambda s, c: nnx.merge(graph, s).unconditional(c))(jax.device_put(state, whole), cond)

    @jax.jit
    def draw_sharded(state, retriever, cond, uncond, keys):
        return decode(nnx.merge(graph, state), cond, uncond, Daid(0.3, 0.2), retriever, keys, SamplingConfig(5.0))

    spread = draw_sharded(jax.device_put(state, whole), jax.device_put(retriever, whole), cond, uncond, keys)
    np.testing.assert_array_equal(alone.codes, spread.codes)


@pytest.mark.slow
def test_scann_in_the_loop_draws_what_dense_draws(model):
    ids, mask = tiny.prompts((4, 3))
    drawn = [
        sample(model, ids, Daid(0.6, 0.5), tiny.untied(model, kind=kind), prompt_mask=mask)
        for kind in (DenseRetriever, ScannRetriever)
    ]
    np.testing.assert_array_equal(drawn[0].codes, drawn[1].codes)
    np.testing.assert_array_equal(drawn[0].source, drawn[1].source)


@pytest.mark.slow
def test_no_guidance_equals_guidance_of_scale_one(model):
    ids, mask = tiny.prompts((4, 6))
    one, none = (sample(model, ids, prompt_mask=mask, cfg_scale=scale) for scale in (1.0, None))
    np.testing.assert_array_equal(one.codes, none.codes)
    np.testing.assert_allclose(one.log_p, none.log_p, atol=1e-5)


@pytest.mark.slow
def test_greedy_is_the_limit_of_a_low_temperature(model):
    ids, mask = tiny.prompts((4, 6))
    greedy = sample(model, ids, prompt_mask=mask, greedy=True)
    cold = sample(model, ids, prompt_mask=mask, temperature=1e-4)
    best = sample(model, ids, prompt_mask=mask, top_k=1)
    np.testing.assert_array_equal(greedy.codes, cold.codes)
    np.testing.assert_array_equal(greedy.codes, best.codes)


@pytest.mark.slow
def test_the_reference_draws_the_same(reference):
    model = load_model(reference("janus_layout"), grid=(6, 6))
    golden = np.load(reference("base.npz"))
    ids, mask = golden["text_ids_left"], golden["text_mask_left"]
    drawn = sample(model, ids, prompt_mask=mask, cfg_scale=5.0, greedy=True, return_log_probs=True)
    for i in (0, 1):
        np.testing.assert_array_equal(drawn.codes[i], golden[f"dec_tokens_{i}"])
        np.testing.assert_allclose(drawn.log_probs[i], jax.nn.log_softmax(golden[f"dec_cfg_logits_{i}"]), atol=1e-4)
        if (name := f"dec_image_{i}") in golden:
            images, floats = model.decode_codes(drawn.codes[i : i + 1], 6, 6), golden[name]
            images = images if floats.shape == images.shape else images[:, 32:64]  # the committed part
            np.testing.assert_allclose((np.asarray(images) + 1) / 2 * 255, floats, atol=0.01)
            sure = np.abs(floats - np.round(floats)) > 0.01  # elsewhere rounding may put it on the other side
            np.testing.assert_array_equal(to_uint8(images)[sure], golden[f"dec_image_uint8_{i}"][sure])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent", "codebook"])
def test_the_reference_draws_the_same_with_daid(reference, kind):
    model = load_model(reference("janus_layout"), grid=(6, 6))
    base = np.load(reference("base.npz"))
    golden = np.load(reference("retrieval.npz", whole=kind == "latent"))
    positions = grid.context_positions(6, 6)[grid.positions_with_context(6, 6)]
    vectors = golden["grid_latents"] if kind == "latent" else golden["codebook_normalised"][golden["grid_codes"]]
    keys = vectors.reshape(-1, 36, 8)[:, positions].reshape(-1, 32)
    values = grid.next_codes_of_grids(golden["grid_codes"]).reshape(-1)
    retriever = DenseRetriever.create(keys, values, golden["codebook_normalised"], int(golden["top_k"]))
    ids, mask = base["text_ids_left"], base["text_mask_left"]
    for weight in ("0.1", "0.5"):
        policy = Daid(float(weight), float(golden["daid_retri_temperature"]))
        drawn = sample(model, ids, policy, retriever, prompt_mask=mask, greedy=True, return_log_probs=True)
        for i in (0, 1):
            np.testing.assert_array_equal(drawn.codes[i], golden[f"daid_{kind}_p{i}_r{weight}_tokens"])
            if (probs := f"daid_{kind}_p{i}_r{weight}_probs") in golden:
                np.testing.assert_allclose(np.exp(drawn.log_probs[i]), golden[probs], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": Daid(0.1, 0.1), "retriever": None}, "needs a retriever"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 10}, "top_k = 10 is more than the 9 codes there are"),
        ({"cfg_scale": np.array([1.0, 2.0])}, r"cfg_scale = array\(\[1\., 2\.\]\) must be one number"),
        ({"seed": 0.5}, "seed = 0.5 must be a whole number"),
        ({"grid": (4, 0)}, r"grid=\(4, 0\) must be two whole numbers"),
        ({"seed": np.array([1, 2, 3])}, "3 seeds for 1 prompts"),
        ({"condition": np.zeros((1, 1), np.int32)}, "L >= 2"),
        ({"condition": np.full((1, 4), 99)}, r"must lie in \[0, 12\)"),
        ({"prompt_mask": np.array([[0, 0, 0, 1]])}, "empty"),
    ],
)
def test_parts_that_do_not_fit_are_named(model, change, message):
    arguments = {"condition": np.zeros((1, 4), np.int32), **change}
    with pytest.raises(UserError, match=message):
        sample(model, **arguments)


@pytest.mark.parametrize("numbers", [(-0.1, 0.1), (1.1, 0.1), (0.5, 0.0), (0.5, -1.0), (0.5, 0.1, "both")])
def test_daid_refuses_numbers_out_of_range(numbers):
    with pytest.raises(UserError, match="DAiD"):
        Daid(*numbers)
