"""Laws of FAiD in the model and in the decode loop, and the reference's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arrag_jax.config import MeshConfig, SamplingConfig
from arrag_jax.decode.loop import decode, image_keys, sample
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.errors import UserError
from arrag_jax.mesh import make_mesh, put_everywhere
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.config_json import read_config
from arrag_jax.models.janus import Janus
from arrag_jax.models.layouts import PUBLISHED, to_ours
from arrag_jax.models.weights import parameters
from arrag_jax.nn.faid import FaidConfig, FusedBlender
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.variables import Adapter, Frozen
from arrag_jax.ops import grid
from arrag_jax.ops.sampling import guide, truncate
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.training.faid import mark_adapters
from helpers import tiny

pytestmark = pytest.mark.slow

K = 3
CONFIG = dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=1, hops=(1, 2), neighbors=K))


@pytest.fixture(scope="module")
def model():
    return tiny.janus(config=CONFIG)


@pytest.fixture(scope="module")
def retriever(model):
    return tiny.untied(model)


@pytest.fixture(scope="module")
def golden_model(reference):
    """As it is published, its config silent about the grid."""
    return load_model(reference("faid_layout"))


def retrieved(model, retriever, codes, k: int = K) -> tuple[np.ndarray, object]:
    """The first k codes [B, T, k] that the search finds for every cell of whole grids, and all its neighbours."""
    positions = grid.context_positions(*model.grid)
    contexts = np.where(positions[None] >= 0, np.asarray(codes)[:, positions], -1)
    found = retriever.search(jnp.asarray(contexts.reshape(-1, 4), jnp.int32))
    return np.asarray(found.code).reshape(*codes.shape, -1)[..., :k], found


@pytest.mark.parametrize("policy", [Faid(), Faid(Daid(0.4, 0.3), neighbors=5)], ids=["faid", "faid+daid, other K"])
def test_step_by_step_equals_teacher_forcing(model, retriever, policy):
    """Boundary cells included; unconditional rows are those of the model without blenders."""
    ids, mask = tiny.prompts((3, 6, 4))
    drawn = sample(model, ids, policy, retriever, cfg_scale=2.0, prompt_mask=mask, seed=3)
    neighbors, found = retrieved(model, retriever, drawn.codes, policy.neighbors or K)
    cond = model.score(ids, drawn.codes, neighbors, mask)
    uncond = model.score(model.unconditional(model.check_condition(ids, mask)), drawn.codes)
    logits = guide(jnp.concatenate([cond, uncond]).reshape(-1, cond.shape[-1]), 2.0)
    log_p = policy.mixture.log_probs(truncate(logits, 1.0, None, None), found, jnp.asarray(True)).reshape(cond.shape)
    expected = np.take_along_axis(np.asarray(log_p), np.asarray(drawn.codes)[..., None], -1)[..., 0]
    np.testing.assert_allclose(drawn.log_p, expected, atol=2e-5)
    assert np.abs(cond - model.score(ids, drawn.codes, prompt_mask=mask)).max() > 0.1  # the blenders do something


def test_weight_zero_beside_faid_is_faid_to_the_bit(model, retriever):
    ids, mask = tiny.prompts((5, 2))
    faid, both = (sample(model, ids, Faid(m), retriever, prompt_mask=mask, seed=1) for m in (Plain(), Daid(0.0, 0.1)))
    np.testing.assert_array_equal(faid.codes, both.codes)
    np.testing.assert_array_equal(faid.log_p, both.log_p)


def test_weight_one_beside_faid_draws_retrieved_codes_only(model, retriever):
    ids, mask = tiny.prompts((5, 2, 3))
    tiny.assert_retrieved(sample(model, ids, Faid(Daid(1.0, 0.5)), retriever, prompt_mask=mask), model, retriever)


def test_a_mesh_draws_what_one_device_draws(model, retriever):
    ids, mask = tiny.prompts((5, 2))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    alone = sample(model, ids, Faid(Daid(0.3, 0.2)), retriever, prompt_mask=mask)
    spread = sample(model, ids, Faid(Daid(0.3, 0.2)), put_everywhere(retriever, mesh), prompt_mask=mask, mesh=mesh)
    np.testing.assert_array_equal(alone.codes, spread.codes)
    np.testing.assert_allclose(alone.log_p, spread.log_p, atol=1e-5)


def test_unconditional_rows_are_not_computed(model, retriever, monkeypatch):
    """Of the 2B rows of a guided batch the blenders work off B, and keep past hidden states of B."""
    ids, mask = tiny.prompts((5, 2, 3))
    cond = model.check_condition(ids, mask)
    uncond, keys = model.unconditional(cond), image_keys(0, 3)
    rows, blend_position = set(), FusedBlender.blend_position

    def noted(self, window, features, complete):
        rows.add((len(window), len(features)))
        return blend_position(self, window, features, complete)

    monkeypatch.setattr(FusedBlender, "blend_position", noted)
    fused = model.fused()
    jax.eval_shape(lambda: decode(fused, cond, uncond, Faid(), retriever, keys, SamplingConfig(2.0)))
    assert rows == {(3, 3)}
    guided = jax.tree.map(lambda *pair: jnp.concatenate(pair), cond, uncond)
    _, cache = jax.eval_shape(lambda: fused.prefill(guided, 3))
    assert [len(past) for past in cache.looked_at] == [3, 3]
    assert {len(kept) for kept in (*cache.keys, *cache.values)} == {6}


def test_a_batch_equals_its_pictures_drawn_alone(model, retriever):
    ids, mask = tiny.prompts((6, 3, 3))
    seeds = np.array([7, 7, 1])
    batch = sample(model, ids, Faid(), retriever, cfg_scale=3.0, prompt_mask=mask, seed=seeds)
    for i in range(3):
        alone = sample(
            model, ids[i : i + 1, int((~mask[i]).sum()) :], Faid(), retriever, cfg_scale=3.0, seed=seeds[i : i + 1]
        )
        np.testing.assert_array_equal(batch.codes[i], alone.codes[0])
        np.testing.assert_allclose(batch.log_p[i], alone.log_p[0], atol=1e-5)


def test_no_future_code_reaches_a_past_distribution(model):
    """Through attention, and through the blenders' windows, of which there are two in a row here."""
    rng = np.random.default_rng(0)
    llama, (height, width) = model.language_model, model.grid
    cells, prompt = height * width, 4
    x = jnp.asarray(rng.normal(size=(1, prompt + cells - 1, 16)), jnp.float32)
    features = jnp.asarray(rng.normal(size=(1, cells, K, 16)), jnp.float32)
    filled, positions = jnp.ones((1, x.shape[1]), bool), jnp.arange(x.shape[1])[None]

    def logits_of(inputs):
        """Logits of each cell when ``inputs`` [T, D] is added to the embeddings of the codes."""
        moved = x.at[0, prompt:].add(inputs[:-1])
        return model.gen_head(llama.forward(moved, positions, filled, model.grid, features)[0][0, prompt - 1 :]).sum(-1)

    influence = np.abs(jax.jit(jax.jacobian(logits_of))(jnp.zeros((cells, 16)))).sum(-1)  # [cell, code put in]
    assert np.all(influence[np.triu_indices(cells)] == 0.0)
    assert np.all(influence[np.tril_indices(cells, -1)] > 0.0)


def test_a_row_without_its_caption_is_not_blended(model):
    condition = model.check_condition(tiny.prompts((4, 4)))
    rng = np.random.default_rng(0)
    codes, neighbors = (jnp.asarray(rng.integers(0, 9, (2, 20, *more)), jnp.int32) for more in ((), (K,)))
    logits, gates = nnx.jit(Janus.forward)(model, condition, codes, neighbors, jnp.array([True, False]))
    np.testing.assert_allclose(logits[0], model.score(condition, codes, neighbors)[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], model.score(condition, codes)[1], atol=1e-5)
    assert gates.shape == (2,) and np.all((gates > 0) & (gates < 1))


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, model):
    save_model(model, tmp_path)
    assert read_config(tmp_path) == model.config
    loaded = parameters(load_model(tmp_path))
    for path, value in parameters(model).items():
        np.testing.assert_array_equal(value[...], loaded[path][...], err_msg=path)


def test_what_does_not_fit_is_named(model, retriever):
    ids, _ = tiny.prompts((4,))
    codes = np.zeros((1, 20), np.int32)
    with pytest.raises(UserError, match="no FAiD blenders; decode it with --method plain or daid"):
        sample(tiny.janus(), ids, Faid(), retriever)
    with pytest.raises(UserError, match="blends 3 neighbours, the search gives k=2"):
        sample(model, ids, Faid(), tiny.store(model, k=2))
    with pytest.raises(UserError, match="blends 7 neighbours, the search gives k=6; raise k"):
        sample(model, ids, Faid(neighbors=7), retriever)
    with pytest.raises(UserError, match=r"neighbor_codes must be \[B, T, K\]"):
        model.score(ids, codes, neighbor_codes=np.zeros((1, 19, K), np.int32))
    with pytest.raises(UserError, match=r"neighbor_codes must lie in \[-1, 9\)"):
        model.score(ids, codes, neighbor_codes=np.full((1, 20, K), 9))
    with pytest.raises(UserError, match="no FAiD blenders"):
        tiny.janus().score(ids, codes, neighbor_codes=np.zeros((1, 20, K), np.int32))


def test_merged_lora_is_lora_beside(model):
    """And a fresh one changes nothing; also where heads are wider than their share of the width."""
    condition = tuple(jnp.asarray(x) for x in tiny.prompts((4, 3)))
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 20)), jnp.int32)
    language = dataclasses.replace(CONFIG.language, head_dim=6)
    tuned = tiny.janus(config=dataclasses.replace(CONFIG, language=language))
    before = tuned.teacher_forced(condition, codes)
    for layer in tuned.language_model.layers:
        layer.attention.add_lora(LoraConfig(rank=2, alpha=4.0, dropout=0.5), nnx.Rngs(0))
    np.testing.assert_array_equal(tuned.teacher_forced(condition, codes), before)
    for layer in tuned.language_model.layers:
        tiny.fill(layer.attention.q_lora.b, 1)
        tiny.fill(layer.attention.v_lora.b, 2)
    beside = tuned.teacher_forced(condition, codes)
    dropped = tuned.forward(condition, codes, rngs=nnx.Rngs(0))[0]
    for layer in tuned.language_model.layers:
        layer.attention.merge_lora()
    assert np.abs(beside - before).max() > 0.1
    assert np.abs(beside - dropped).max() > 0.1
    np.testing.assert_allclose(tuned.teacher_forced(condition, codes), beside, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reference_logits_and_loss(golden_model, reference, side):
    """Padding never changes a result: right-padded prompts must give what the reference gives for left-padded ones."""
    golden = np.load(reference("faid.npz"))
    ids, mask, codes = golden[f"text_ids_{side}"], golden[f"text_mask_{side}"], golden["gt_tokens"]
    logits = golden_model.score(ids, codes, golden["retrieved_codes"], mask)
    np.testing.assert_allclose(logits, golden["tf_logits_left"][:, -37:-1], atol=1e-4)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(codes)).mean()
    np.testing.assert_allclose(loss, golden["tf_loss_left"], rtol=1e-5)


def test_reference_logits_with_nothing_retrieved(golden_model, reference):
    golden = np.load(reference("faid.npz"))
    nothing = np.full_like(golden["retrieved_codes"], -1)
    logits = golden_model.score(golden["text_ids_left"], golden["gt_tokens"], nothing, golden["text_mask_left"])
    np.testing.assert_allclose(logits, golden["tf_logits_left_all_minus1"][:, -37:-1], atol=1e-4)


def test_reference_logits_of_the_base(golden_model, reference):
    """Without neighbours."""
    golden = np.load(reference("base.npz"))
    logits = golden_model.score(golden["text_ids_left"], golden["image_ids"], prompt_mask=golden["text_mask_left"])
    np.testing.assert_allclose(logits, golden["tf_logits_left"][:, -37:-1], atol=1e-4)


def test_the_grid_of_codes_is_known_or_named(golden_model, reference):
    """A square's is; these 36 codes could also be 4 x 9, which windows of blenders tell from 6 x 6."""
    golden = np.load(reference("faid.npz"))
    names = ("text_ids_left", "gt_tokens", "retrieved_codes", "text_mask_left")
    ids, codes, neighbors, mask = (golden[name] for name in names)
    with pytest.raises(UserError, match=r"35 codes do not fill a grid of 5 x 5; pass the right one: grid=\(H, W\)"):
        golden_model.score(ids, codes[:, :35], neighbors[:, :35], mask)
    with pytest.raises(UserError, match=r"36 codes do not fill a grid of 6 x 5"):
        golden_model.score(ids, codes, neighbors, mask, grid=(6, 5))
    for wrong in (6, (6,), (6, 0), (6.0, 6), "66"):
        with pytest.raises(UserError, match="must be two whole numbers of cells"):
            golden_model.score(ids, codes, neighbors, mask, grid=wrong)
    square, named = (golden_model.score(ids, codes, neighbors, mask, grid=grid) for grid in (None, [np.int64(6), 6]))
    np.testing.assert_array_equal(square, named)


def reference_gradients(model, golden) -> dict[str, np.ndarray]:
    """Loss gradients of the ``Adapter`` variables under their published keys."""
    model = nnx.clone(model.with_grid((6, 6)))
    mark_adapters(model)
    graph, adapters, rest = nnx.split(model, Adapter, ...)
    assert all(
        isinstance(value, Frozen) for _, value in nnx.to_flat_state(rest) if "usage" not in str(type(value)).lower()
    )
    ids, mask, codes, neighbors = (
        jnp.asarray(golden[name], jnp.int32)
        for name in ("text_ids_left", "text_mask_left", "gt_tokens", "retrieved_codes")
    )

    @jax.jit
    @jax.grad
    def gradients(adapters):
        logits = nnx.merge(graph, adapters, rest).teacher_forced((ids, mask.astype(bool)), codes, neighbors)
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    flat = nnx.to_flat_state(gradients(adapters))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def assert_gradients(gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    """1e-4 of each tensor's largest number; of large tensors the first outputs alone are committed."""
    assert len(gradients) == len(expected)
    for path, value in gradients.items():
        golden = to_ours(expected[path], path) if path in expected else to_ours(expected[PUBLISHED.key(path)], path)
        value = value[tuple(slice(size) for size in golden.shape)]
        np.testing.assert_allclose(value, golden, rtol=0, atol=1e-4 * np.abs(golden).max(), err_msg=path)


def test_reference_gradients(golden_model, reference):
    expected = load_file(reference("faid_grads.safetensors"))
    assert_gradients(reference_gradients(golden_model, np.load(reference("faid.npz"))), expected)


def test_reference_lora(golden_model, reference):
    """Logits, gradients of A and B, and the merged kernels."""
    golden, tensors = np.load(reference("lora.npz")), load_file(reference("lora.safetensors"))
    inputs, model = np.load(reference("faid.npz")), nnx.clone(golden_model)
    config = LoraConfig(int(golden["r"]), float(golden["alpha"]))
    name = "language_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"
    official = {}
    for i, layer in enumerate(model.language_model.layers):
        layer.attention.add_lora(config, nnx.Rngs(0))
        for projection in "qv":
            lora = getattr(layer.attention, f"{projection}_lora")
            for side in "ab":
                key = name.format(i, projection, side.upper())
                getattr(lora, side).weight[...] = jnp.asarray(tensors[key])
                path = f"language_model.layers.{i}.attention.{projection}_lora.{side}.weight"
                official[path] = tensors[f"grad::{key}"]
    arguments = (inputs["text_ids_left"], inputs["gt_tokens"], inputs["retrieved_codes"], inputs["text_mask_left"])
    np.testing.assert_allclose(model.score(*arguments), golden["tf_logits_left"][:, -37:-1], atol=1e-4)
    gradients = {path: value for path, value in reference_gradients(model, inputs).items() if "_lora" in path}
    assert_gradients(gradients, official)
    for layer in model.language_model.layers:
        layer.attention.merge_lora()
    merged = {PUBLISHED.key(path): value for path, value in parameters(model).items()}
    for key, value in tensors.items():
        if key.startswith("merged::"):
            ours = merged[key.removeprefix("merged::").replace("base_model.model.", "").replace("base_layer.", "")]
            np.testing.assert_allclose(ours[...], value, atol=1e-6)


def official_search(store) -> DenseRetriever:
    positions = grid.context_positions(6, 6)[grid.positions_with_context(6, 6)]
    keys = store["grid_latents"].reshape(-1, 36, 8)[:, positions].reshape(-1, 32)
    values = grid.next_codes_of_grids(store["grid_codes"]).reshape(-1)
    return DenseRetriever.create(keys, values, store["codebook_normalised"], 10)


def official_answers(golden, codebook) -> DenseRetriever:
    """Of each context that was drawn the ten codes that the official search found; the latents are not committed."""
    inside, book, found = grid.positions_with_context(6, 6), np.asarray(codebook), {}
    for tokens, codes in ((golden[f"dec_boundaryfix_p{i}_{n}"] for n in ("tokens", "retrieved_codes")) for i in (0, 1)):
        found |= zip(map(tuple, tokens[grid.context_positions(6, 6)[inside]]), codes[inside], strict=True)
    keys = book[np.array(list(found))].reshape(-1, 32).repeat(10, axis=0)
    return DenseRetriever.create(keys, np.concatenate(list(found.values())).astype(np.int32), book, 10)


def test_the_reference_draws_the_same(golden_model, reference):
    """The official loop with its one mend, that boundary cells follow training's rule (docs/reference.md "FAiD")."""
    golden, store = np.load(reference("faid.npz")), np.load(reference("retrieval.npz"))
    retriever = official_search(store) if "grid_latents" in store else official_answers(golden, golden_model.codebook)
    base = np.load(reference("base.npz"))
    ids, mask = base["text_ids_left"], base["text_mask_left"]
    drawn = sample(
        golden_model, ids, Faid(), retriever, greedy=True, prompt_mask=mask, grid=(6, 6), return_log_probs=True
    )
    for i in (0, 1):
        tokens, logits = (golden[f"dec_boundaryfix_p{i}_{name}"] for name in ("tokens", "cfg_logits"))
        np.testing.assert_array_equal(drawn.codes[i], tokens)
        np.testing.assert_allclose(drawn.log_probs[i], jax.nn.log_softmax(logits), atol=1e-4)
