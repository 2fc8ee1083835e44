"""FAiD's blending in its cheap form is the paper's window-by-window form: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arrag_jax import mesh
from arrag_jax.config import MeshConfig
from arrag_jax.costs import costs_of
from arrag_jax.errors import UserError
from arrag_jax.models.weights import to_ours
from arrag_jax.nn.abstract import abstract
from arrag_jax.nn.faid import Blended, Blender, FaidConfig, FusedBlender, window_positions
from arrag_jax.ops import blend
from arrag_jax.ops.grid import has_context
from helpers import naive_blend, tiny
from helpers.jaxprs import equations

# Every subset of hops, and K.
CASES = [((1,), 1), ((2,), 3), ((3,), 2), ((1, 2), 3), ((1, 3), 1), ((2, 3), 2), ((1, 2, 3), 4)]
# As large as hop 3 needs it for each of its taps to meet a cell. Only the nine cells inside have a context.
WIDTH, HEIGHT, ACROSS, BATCH, SLOTS = 8, 4, 5, 2, 3


def blender(hops=(1, 2), width=WIDTH, seed=3) -> Blender:
    """A random blender."""
    model = abstract(Blender, config=FaidConfig(stride=1, hops=hops, neighbors=SLOTS), width=width, eps=1e-6)
    tiny.fill(model, seed)
    return model


def inputs(slots: int = SLOTS):
    """Hidden states of a map and features of every slot."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(BATCH, HEIGHT, ACROSS, WIDTH))
    features = rng.normal(size=(BATCH, HEIGHT * ACROSS, slots, WIDTH))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(features, jnp.float32)


def with_gradients(blend_map, model: Blender, *inputs):
    """What a form gives, and for a random pull at it gradients of all parameters, hidden states and features."""
    graph, state = nnx.split(model)

    @jax.jit
    def both(state, *inputs):
        blended, gradients = jax.vjp(lambda state, *inputs: blend_map(nnx.merge(graph, state), *inputs), state, *inputs)
        rng = np.random.default_rng(2)
        return blended, gradients(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), blended))

    return both(state, *inputs)


def assert_close(value, expected):
    """1e-5 of the largest number."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@functools.cache
def naive_with_gradients(hops, slots):
    """Of the random blender."""
    return with_gradients(naive_blend.blend_map, blender(hops), *inputs(slots))


@pytest.mark.slow
@pytest.mark.parametrize("hops, slots", CASES, ids=str)
@pytest.mark.parametrize("composed", [False, True], ids=["staged", "composed"])
def test_the_map_is_the_naive_map_in_values_and_gradients(hops, slots, composed, monkeypatch):
    monkeypatch.setattr(blend, "cheaper_composed", lambda *_: composed)
    found = with_gradients(Blender.blend_map, blender(hops), *inputs(slots))
    jax.tree.map(assert_close, found, naive_with_gradients(hops, slots))


@pytest.mark.slow
@pytest.mark.parametrize("composed", [False, True], ids=["staged", "composed"])
def test_devices_that_split_the_kernels_get_the_same_and_share_the_work(composed, monkeypatch):
    """Slices of kernels need no messages between devices; each composes and multiplies its share."""
    monkeypatch.setattr(blend, "cheaper_composed", lambda *_: composed)
    monkeypatch.setattr(mesh, "SMALLEST_SHARDED", 1)
    devices = mesh.make_mesh(MeshConfig(1, 8))
    graph, state = nnx.split(blender())
    placed = nnx.merge(graph, mesh.put_state(state, devices))
    with jax.set_mesh(devices):
        found = with_gradients(Blender.blend_map, placed, *inputs())
        forward = jax.jit(lambda state, *inputs: nnx.merge(graph, state).blend_map(*inputs).added)
        text = forward.lower(nnx.split(placed)[1], *inputs()).compile().as_text()
    jax.tree.map(assert_close, found, naive_with_gradients((1, 2), SLOTS))
    shared = costs_of(text)
    alone = costs_of(forward.lower(state, *inputs()).compile().as_text())
    assert not {"collective-permute", "all-to-all"} & set(shared.collectives)
    assert shared.flops < alone.flops


@pytest.mark.slow
@pytest.mark.parametrize("hops, slots", CASES, ids=str)
def test_a_cell_alone_is_the_cell_in_the_naive_map(hops, slots):
    hidden, features = inputs(slots)
    complete, windows = has_context(HEIGHT, ACROSS), window_positions(hops, HEIGHT, ACROSS)
    fused, blend_position = FusedBlender(blender(hops)), nnx.jit(FusedBlender.blend_position)
    flat, positions = hidden.reshape(BATCH, -1, WIDTH), []
    for position in range(HEIGHT * ACROSS):
        window = jnp.where(windows[position][None, :, None] >= 0, flat[:, np.maximum(windows[position], 0)], 0)
        positions.append(blend_position(fused, window, features[:, position], jnp.full(BATCH, complete[position])))
    added, blended, gate = (np.stack(values) for values in zip(*positions, strict=True))
    found = Blended(np.moveaxis(added, 0, 1), np.moveaxis(blended, 0, 1), gate.mean())
    jax.tree.map(assert_close, found, naive_with_gradients(hops, slots)[0])


def test_the_form_is_chosen_by_multiply_adds():
    """At the 1B shape one image is worked off in stages, a large batch composed."""
    assert not blend.cheaper_composed((1, 2), 576, 2048)
    assert blend.cheaper_composed((1, 2), 576 * 64, 2048)
    assert blend.cheaper_composed((1, 2), 576 * 8, 2048, 16)  # devices that compose together
    for hop in (1, 2, 3):
        assert len(blend.live_offsets(hop)) == ((2 * hop + 1) ** 2 - 1) // 2
        assert len({offset for _, _, offset in blend.live_pairs(hop)}) == len(blend.live_offsets(hop))


def test_folding_is_done_once_and_again_for_other_weights():
    model = blender()
    first = model.fuse()
    assert model.fuse() is first
    model.conv22.bias[...] = model.conv22.bias[...] + 1
    np.testing.assert_allclose(
        model.fuse().bias[...] - first.bias[...], model.kernels()[1][1], rtol=1e-5
    )  # by the hop's weight
    assert model.fuse() is not first


@pytest.mark.slow
def test_cells_without_a_context_ignore_their_features():
    """The rule of the official training, here for decoding too; context and bias still act."""
    hidden, features = inputs()
    model, inside = blender(), has_context(HEIGHT, ACROSS)
    one, other = model.blend_map(hidden, features), model.blend_map(hidden, 2 * features[:, ::-1])
    np.testing.assert_array_equal(one.added[:, ~inside], other.added[:, ~inside])
    assert np.all(np.abs(one.added - other.added)[:, inside].max(-1) > 0)
    assert np.abs(one.added[:, ~inside]).min() > 0


def test_the_order_of_neighbours_does_not_matter():
    hidden, features = inputs()
    one, other = (blender().blend_map(hidden, f).added for f in (features, features[:, :, ::-1]))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_a_silent_start_adds_nothing_and_can_learn():
    hidden, features = inputs()
    graph, state = nnx.split(Blender(FaidConfig(hops=(1,)), WIDTH, 1e-6, nnx.Rngs(0), start_silent=True))
    added = lambda state: nnx.merge(graph, state).blend_map(hidden, features).added.sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(added))(state)
    assert value == 0
    assert np.abs(nnx.to_pure_dict(grads)["conv12"]["kernel"]).max() > 0


def traced(function, *arguments):
    """Every operation of a function and its gradients, everything given in bfloat16."""

    def both(*arguments):
        value, gradients = jax.vjp(function, *arguments)
        return value, gradients(value)

    arguments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments)
    return list(equations(jax.make_jaxpr(both)(*arguments).jaxpr))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["staged", "composed", "cell"])
def test_all_products_of_bfloat16_are_summed_in_float32(form, monkeypatch):
    monkeypatch.setattr(blend, "cheaper_composed", lambda *_: form == "composed")
    (hidden, features), (graph, state) = inputs(), nnx.split(blender((1, 2, 3)))

    def run(state, hidden, features):
        model = nnx.merge(graph, state)
        if form != "cell":
            return model.blend_map(hidden, features)
        return FusedBlender(model).blend_position(
            hidden.reshape(BATCH, -1, WIDTH), features[:, 0], jnp.full(BATCH, True)
        )

    hidden = hidden if form != "cell" else jnp.ones((BATCH, len(blend.live_offsets(3)), WIDTH))
    products = [e for e in traced(run, state, hidden, features) if e.primitive.name == "dot_general"]
    types = {tuple(str(x.aval.dtype) for x in (*e.invars, *e.outvars)) for e in products}
    assert types == {("bfloat16", "bfloat16", "float32")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["staged", "composed", "centre"])
def test_what_products_give_is_added_up_in_float32(form):
    """Shifted taps, hops, and the gradients of a number that many products take."""

    kernels, weights = blender((1, 2, 3)).kernels()

    def run(kernels, hidden):
        if form == "staged":
            return blend.around_staged(kernels, weights, hidden)
        if form == "composed":
            return blend.around_composed(blend.compose(kernels, weights), blend.live_offsets(3), hidden)
        return blend.centre(kernels, weights)

    sums = {"add", "add_any", "sub", "reduce_sum"}
    found = [e for e in traced(run, kernels, inputs()[0]) if e.primitive.name in sums]
    assert {str(e.outvars[0].aval.dtype) for e in found} == {"float32"}


def test_the_mean_over_neighbours_is_summed_in_float32():
    """In bfloat16 it is off by the rounding of its terms and its result, however many neighbours there are."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, HEIGHT, ACROSS, WIDTH)), jnp.bfloat16)
    features = jnp.asarray(rng.normal(size=(1, HEIGHT * ACROSS, 200, WIDTH)), jnp.bfloat16)
    model = blender()
    for _, value in nnx.to_flat_state(nnx.state(model)):
        value.set_value(value[...].astype(jnp.bfloat16))
    blended = nnx.jit(Blender.blend_map)(model, hidden, features)
    terms = np.asarray(blended.features, np.float32)
    off = np.abs(np.asarray(blended.added, np.float32) - terms.mean(2))
    assert blended.added.dtype == jnp.bfloat16
    assert np.all(off <= 2**-8 * np.abs(terms).mean(2))


@pytest.mark.parametrize("hops", [(), (2, 1), (1, 1), (4,)])
def test_unknown_hops_are_refused(hops):
    with pytest.raises(UserError, match="rising subset"):
        FaidConfig(hops=hops)


def reference_blender(reference, name: str) -> Blender:
    """A blender of the reference; the official module is given features that are normed already."""
    weights = load_file(reference("blender_alone.safetensors"))
    hops = tuple(int(hop) for hop in name[1:])
    model = abstract(Blender, config=FaidConfig(stride=1, hops=hops), width=64, eps=1e-6)
    official = {"gate.0": "mlp.0", "gate.1": "mlp.2"}
    for path, value in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, path))
        if path == "norm_scale":
            value.set_value(jnp.ones(64))
            continue
        key = path.replace("kernel", "weight")
        for ours, theirs in official.items():
            key = key.replace(ours, theirs)
        value.set_value(jnp.asarray(to_ours(weights[f"{name}.{key}"], path)))
    model.norm = lambda features: features
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h1", "h2", "h12"])
def test_the_reference_blends_the_same(reference, name):
    golden, model = np.load(reference("blender_alone.npz")), reference_blender(reference, name)
    hidden = jnp.asarray(golden[f"{name}_train_hidden"])[:, -36:].reshape(2, 6, 6, 64)
    out = model.blend_map(hidden, jnp.asarray(golden[f"{name}_train_retrieved"])).features
    expected = golden[f"{name}_train_out"]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h1", "h2", "h12"])
def test_the_reference_blends_cell_by_cell_the_same(reference, name):
    """Its decoding path, which has no rule for boundary cells: all count as having a context."""
    golden, model = np.load(reference("blender_alone.npz")), FusedBlender(reference_blender(reference, name))
    for i, position in enumerate(golden[f"{name}_eval_pos"]):
        window = window_positions(model.config.hops, 6, 6)[position]
        tokens = golden[f"{name}_eval_hidden_padded"][i][:, 5:]  # five of the prompt come first
        around = np.where(window[None, :, None] >= 0, tokens[:, window], 0)
        features = np.repeat(golden[f"{name}_eval_retrieved"][i].reshape(1, 10, 64), 2, axis=0)
        out = model.blend_position(jnp.asarray(around), jnp.asarray(features), jnp.full(len(features), True)).features
        expected = golden[f"{name}_eval_out"][i][:, 0]
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
