"""What compiled programs cost: counted from their text, and compiled for TPUs that are not here."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from arrag_jax.config import DatastoreConfig, DrawConfig, MeshConfig, RetrievalConfig, TrainConfig
from arrag_jax.costs import costs_of
from arrag_jax.errors import UserError
from arrag_jax.evaluation.dry_run import drawing_programs
from arrag_jax.models.checkpoint import save_model
from arrag_jax.store.dry_run import encoding_program
from arrag_jax.topology import CHIPS, Program, Topology, dry_run, measured, open_topology, table
from arrag_jax.training.dry_run import training_program
from helpers import tiny


def text_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.as_text(), compiled.cost_analysis()


def test_products_count_two_operations_per_multiply_add():
    text, analysis = text_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 8, 16), (2, 16, 4))
    assert costs_of(text).flops == 2 * 2 * 8 * 16 * 4 == analysis["flops"]


def test_a_loop_counts_as_often_as_it_runs():
    """XLA's own analysis counts its body once."""

    def looped(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def unrolled(x, weights):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    found, expected = (costs_of(text_of(f, (4, 32), (5, 32, 32))[0]) for f in (looped, unrolled))
    assert found.flops == expected.flops == 5 * 2 * 4 * 32 * 32
    # A slice of the stacked weights counts, not the stack: less than three times the bytes of the unrolled form.
    assert expected.bytes <= found.bytes < 3 * expected.bytes


def test_a_slice_that_is_fetched_ahead_counts_once():
    """A TPU program reads a quarter of a weight into fast memory (S(1)) while it computes; the whole is not read."""
    layout = "{1,0:T(8,128)(2,1)}"
    text = f"""ENTRY %main (w: bf16[64,128]) -> bf16[16,128] {{
  %w = bf16[64,128]{layout} parameter(0)
  %s = ((bf16[64,128]{layout}), bf16[16,128]{layout[:-1]}S(1)}}, s32[]) slice-start(%w), slice={{[0:16], [0:128]}}
  ROOT %d = bf16[16,128]{layout[:-1]}S(1)}} slice-done(%s)
}}"""
    assert costs_of(text).bytes == 16 * 128 * 2
    assert costs_of(text.replace("S(1)", "")).bytes == 2 * 16 * 128 * 2  # into main memory: written, too


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded",
        "Out of memory on HBM, the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_the_compiler_gives_up_does_not_fit(words):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}")

    figures = measured(Program("a step", Lowered, {}), CHIPS["v5e"])
    assert not figures["fits"]
    assert (figures["peak_bytes"], figures["over_bytes"]) == (int(20.5 * 2**30), int(20.5 * 2**30) - int(15.75 * 2**30))


def test_collectives_count_what_a_device_sends():
    mesh = jax.make_mesh((8,), ("x",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    gathered = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function = jax.jit(lambda x: x + 1, in_shardings=placed, out_shardings=gathered)
    costs = costs_of(function.lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile().as_text())
    assert dict(costs.collectives) == {"all-gather": 1}
    assert costs.link_bytes == 64 * 4 * 4 * 7 / 8


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:2x2", "v5e:2x2x2", "v5p:2x2", "4x4"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(UserError, match="is unknown; give one such as v5e:4x4"):
        open_topology(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "model"
    save_model(tiny.janus(), folder)
    return str(folder)


def programs(base, topology):
    """Every program that a command compiles for a topology, at shapes that compile fast; weights are not read."""
    mesh = MeshConfig(-1, 2)
    options = {
        "base": base, "neighbors": "none", "retrieval": {"store": "none", "k": 3},
        "faid": {"stride": 1, "hops": (1, 2), "neighbors": 3}, "lora": {"rank": 2}, "prompt_length": 6,
    }  # fmt: skip
    training = TrainConfig(
        "faid", steps=1, batch_size=8, options=options, mesh=mesh, accumulate=2, compute_dtype="bfloat16", remat="dots"
    )
    drawing = DrawConfig(base, RetrievalConfig("none", k=12), mesh=mesh, batch_size=2, dtype="bfloat16")
    yield training_program(training, topology)
    yield from drawing_programs(drawing, ("plain", "daid", "faid"), topology, patches=1000)
    yield encoding_program(DatastoreConfig(base, "none", batch_size=2), topology)


def check(base, topology):
    kinds = []
    for program in programs(base, topology):
        figures = measured(program, topology.chip)
        assert figures["fits"] and 0 < sum(figures["held_bytes"].values()) <= figures["peak_bytes"], figures
        assert figures["flops"] > 0 and figures["bytes"] > figures["held_bytes"]["parameters"] / 4
        assert "bound by" in table(figures)
        kinds.append(program.name)
    assert len(kinds) == 5


@pytest.mark.slow
def test_every_program_is_made_from_shapes_alone(base):
    """Compiled for this machine's devices in place of a TPU's."""
    check(base, Topology("cpu", CHIPS["v5e"], jax.devices()[:4]))


def test_a_program_that_does_not_fit_is_told_by_how_much(base, tmp_path, capsys):
    topology = Topology("cpu", CHIPS["v5e"]._replace(hbm_bytes=10), jax.devices()[:1])
    program = encoding_program(DatastoreConfig(base, "none", batch_size=2), topology)
    assert dry_run(topology, [program], tmp_path) == 1
    record = json.loads((tmp_path / "topology.json").read_text())
    assert record["over_bytes"] == record["peak_bytes"] - 10 > 0 and not record["fits"]
    assert "does not fit cpu: it needs" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is absent: pip install 'arrag_jax[tpu-aot]'"
)
def test_every_program_compiles_for_a_tpu(base):
    check(base, open_topology("v5e:2x2"))
