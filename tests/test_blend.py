"""FAiD's blending in its cheap form is the paper's window-by-window form: values and gradients."""

import jax
import jax.numpy as jnp
import naive_blend
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

from arrag_jax.errors import UserError
from arrag_jax.models.weights import to_ours
from arrag_jax.nn.faid import Blender, FaidConfig, FoldedBlender, window_cells
from arrag_jax.ops import blend
from arrag_jax.ops.grid import has_context

HOPS = [(1,), (3,), (1, 2), (1, 2, 3)]
WIDTH, HEIGHT, ACROSS, BATCH, SLOTS = 8, 3, 4, 2, 3


def kernels_of(hops: tuple[int, ...], seed: int = 0):
    """Random convolutions and hop weights."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH, jnp.float32)  # noqa: E731
    square = lambda hop: normal(hop + 1, hop + 1, WIDTH, WIDTH)  # noqa: E731
    kernels = [blend.HopKernels(square(hop), normal(WIDTH), square(hop), normal(WIDTH)) for hop in hops]
    return kernels, jax.nn.softmax(jnp.asarray(rng.normal(size=len(hops)), jnp.float32))


def inputs(seed: int = 1):
    """Hidden states of a map and features of every slot."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, HEIGHT, ACROSS, WIDTH))
    features = rng.normal(size=(BATCH, HEIGHT * ACROSS, SLOTS, WIDTH))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(features, jnp.float32)


def cheap(form, kernels, weights, hidden, features):
    """The value before the gate, in stages or composed."""
    if form == "staged":
        around = blend.around_staged(kernels, weights, hidden)
    else:
        offsets = blend.live_offsets(max(kernel.hop for kernel in kernels))
        around = blend.around_composed(blend.compose(kernels, weights), offsets, hidden)
    centre = blend.centre(kernels, weights)
    around = around.reshape(BATCH, -1, 1, WIDTH) + centre.bias.reshape(1, 1, 1, -1)
    return around + jnp.einsum("btki,oi->btko", features, centre.matrix)


@pytest.mark.parametrize("hops", HOPS, ids=str)
def test_cheap_is_naive_in_values_and_gradients(hops):
    arguments = (*kernels_of(hops), *inputs())
    pull = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, HEIGHT * ACROSS, SLOTS, WIDTH)), jnp.float32)

    def value_and_gradients(function):
        def both(*arguments):
            value, gradients = jax.vjp(function, *arguments)
            return value, gradients(pull)

        return jax.jit(both)(*arguments)

    expected = value_and_gradients(lambda *a: naive_blend.blend(*a[:2], None, *a[2:]))
    for form in ("staged", "composed"):
        jax.tree.map(assert_close, value_and_gradients(lambda *a, form=form: cheap(form, *a)), expected)


def assert_close(value, expected):
    """1e-5 of the largest number."""
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_form_is_chosen_by_multiply_adds():
    """At the 1B shape one image is worked off in stages, a large batch composed."""
    assert not blend.cheaper_composed((1, 2), 576, 2048)
    assert blend.cheaper_composed((1, 2), 576 * 64, 2048)
    for hop in (1, 2, 3):
        assert len(blend.live_offsets(hop)) == ((2 * hop + 1) ** 2 - 1) // 2
        assert len({offset for _, _, offset in blend.live_pairs(hop)}) == len(blend.live_offsets(hop))


def blender(hops=(1, 2), width=WIDTH, seed=3) -> Blender:
    """A random blender."""
    model = nnx.eval_shape(lambda: Blender(FaidConfig(stride=1, hops=hops, neighbors=SLOTS), width, 1e-6, nnx.Rngs(0)))
    tiny.fill(model, seed)
    return model


@pytest.mark.parametrize("hops", HOPS, ids=str)
def test_a_cell_alone_is_the_cell_in_the_map(hops):
    hidden, features = inputs()
    model, complete = blender(hops), has_context(HEIGHT, ACROSS)
    whole = model.blend_map(hidden, features)
    folded, windows = model.fold(), window_cells(hops, HEIGHT, ACROSS)
    flat, blend_cell = hidden.reshape(BATCH, -1, WIDTH), nnx.jit(FoldedBlender.blend_cell)
    for cell in range(HEIGHT * ACROSS):
        window = jnp.where(windows[cell][None, :, None] >= 0, flat[:, np.maximum(windows[cell], 0)], 0)
        alone = blend_cell(folded, window, features[:, cell], jnp.asarray(complete[cell]))
        np.testing.assert_allclose(alone.features, whole.features[:, cell], atol=1e-5)
        np.testing.assert_allclose(alone.added, whole.added[:, cell], atol=1e-5)


def test_folding_is_done_once_and_again_for_other_weights():
    model = blender()
    first = model.fold()
    assert model.fold() is first
    model.conv22.bias[...] = model.conv22.bias[...] + 1
    np.testing.assert_allclose(
        model.fold().bias[...] - first.bias[...], model.kernels()[1][1], rtol=1e-5
    )  # by the hop's weight
    assert model.fold() is not first


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


def test_a_silent_start_adds_nothing_and_can_learn():
    hidden, features = inputs()
    graph, state = nnx.split(Blender(FaidConfig(hops=(1,)), WIDTH, 1e-6, nnx.Rngs(0), start_silent=True))
    added = lambda state: nnx.merge(graph, state).blend_map(hidden, features).added.sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(added))(state)
    assert value == 0
    assert np.abs(nnx.to_pure_dict(grads)["conv12"]["kernel"]).max() > 0


def test_bfloat16_sums_in_float32():
    """The error against float32 is that of rounding the inputs and the result, not of adding up 24 products."""
    kernels, weights = kernels_of((3,))
    hidden, _ = inputs()
    rounded, exact = (jax.tree.map(lambda x, t=t: x.astype(jnp.bfloat16).astype(t), (kernels, hidden))
                      for t in (jnp.bfloat16, jnp.float32))  # fmt: skip
    value, expected = (blend.around_staged(kernels, weights, hidden) for kernels, hidden in (rounded, exact))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=0, atol=2**-8 * float(jnp.abs(expected).max()))


def test_the_mean_over_neighbours_is_summed_in_float32():
    """In bfloat16 it is off by the rounding of its terms and its result, however many neighbours there are."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, HEIGHT, ACROSS, WIDTH)), jnp.bfloat16)
    features = jnp.asarray(rng.normal(size=(1, HEIGHT * ACROSS, 200, WIDTH)), jnp.bfloat16)
    model = blender()
    for _, value in nnx.to_flat_state(nnx.state(model)):
        value.set_value(value[...].astype(jnp.bfloat16))
    blended = model.blend_map(hidden, features)
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
    weights = load_file(reference / "blender_alone.safetensors")
    hops = tuple(int(hop) for hop in name[1:])
    model = nnx.eval_shape(lambda: Blender(FaidConfig(stride=1, hops=hops), 64, 1e-6, nnx.Rngs(0)))
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


@pytest.mark.parametrize("name", ["h1", "h2", "h12"])
def test_the_reference_blends_the_same(reference, name):
    golden, model = np.load(reference / "blender_alone.npz"), reference_blender(reference, name)
    hidden = jnp.asarray(golden[f"{name}_train_hidden"])[:, -36:].reshape(2, 6, 6, 64)
    out = model.blend_map(hidden, jnp.asarray(golden[f"{name}_train_retrieved"])).features
    expected = golden[f"{name}_train_out"]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["h1", "h2", "h12"])
def test_the_reference_blends_cell_by_cell_the_same(reference, name):
    """Its decoding path, which has no rule for boundary cells: all count as having a context."""
    golden, model = np.load(reference / "blender_alone.npz"), FoldedBlender(reference_blender(reference, name))
    for i, cell in enumerate(golden[f"{name}_eval_pos"]):
        window = window_cells(model.config.hops, 6, 6)[cell]
        tokens = golden[f"{name}_eval_hidden_padded"][i][:, 5:]  # five of the prompt come first
        around = np.where(window[None, :, None] >= 0, tokens[:, window], 0)
        features = np.repeat(golden[f"{name}_eval_retrieved"][i].reshape(1, 10, 64), 2, axis=0)
        out = model.blend_cell(jnp.asarray(around), jnp.asarray(features), jnp.asarray(True)).features
        expected = golden[f"{name}_eval_out"][i][:, 0]
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
