"""Laws of FAiD's fine-tuning: what is trained, what it starts from, what neighbours it sees, what it exports."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrag_jax import convert, generate, mesh
from arrag_jax.config import DataConfig, DataSetConfig, DrawConfig, MeshConfig, RetrievalConfig
from arrag_jax.data.loader import make_loader
from arrag_jax.errors import UserError
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.measure import bits_of_examples
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.models.checkpoint import load_model, save_model
from arrag_jax.models.weights import parameters
from arrag_jax.nn.variables import Adapter, Frozen
from arrag_jax.ops import blend as blend_ops
from arrag_jax.training.faid import FaidTask
from arrag_jax.training.loop import make_train_step, train
from arrag_jax.training.optimizer import make_optimizer
from arrag_jax.training.state import init_state
from arrag_jax.training.tasks import make_task
from helpers import workshop
from helpers.toy import by_path, final_state, lines, losses, split_leaves


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny base with its store and neighbour sets."""
    path = tmp_path_factory.mktemp("workshop")
    workshop.build(path)
    return path


def without_pictures(monkeypatch):
    """Drawing them takes longer than a short training."""
    monkeypatch.setattr(FaidTask, "sample_callback", lambda self, mesh: lambda model: {})


def first_batch(task) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, next(iter(task.eval_batches(8))))


def bits(task, model, batch) -> float:
    return float(jax.jit(task.eval_metrics)(model, batch)["bits_per_code"])


@pytest.mark.parametrize("blend", [True, False], ids=["faid", "lora only"])
def test_trainable_are_lora_blenders_and_head_alone(folder, blend):
    model = make_task(workshop.config(folder, {"blend": blend})).init_model(nnx.Rngs(0))
    kinds = {path: type(value) for path, value in parameters(model).items()}
    expected = ("attention.q_lora.", "attention.v_lora.", "gen_head.") + ((".blender.",) if blend else ())
    for path, kind in kinds.items():
        assert kind is (Adapter if any(part in path for part in expected) else Frozen), path
    for part in expected:
        assert any(part in path for path in kinds)


@pytest.mark.slow
def test_training_changes_every_adapter_and_nothing_else(folder, tmp_path):
    """The export is the trained model with its LoRA merged; what was frozen, projections apart, is as it was."""
    config = workshop.config(folder)
    train(config, make_task(config), tmp_path)
    before = parameters(make_task(config).init_model(nnx.Rngs(config.seed)))
    after = parameters(load_model(tmp_path / "export"))
    state = final_state(tmp_path, config, make_task(config))
    for path, value in after.items():
        if type(before[path]) is Adapter:  # in float32, because a small change may round to none in the export
            assert not np.array_equal(state[f"params/{path.replace('.', '/')}"], before[path][...]), path
            continue
        rounded = before[path][...]
        if not path.startswith("gen_vision_model"):
            rounded = rounded.astype(jnp.bfloat16).astype(jnp.float32)
        same = np.array_equal(value[...], rounded)
        trained = path.endswith(("attention.q.weight", "attention.v.weight"))
        assert same != trained, path
    written = lines(tmp_path)
    measured = [line["eval/bits_per_code"] for line in written if "eval/bits_per_code" in line]
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["figures"]["valid_bits_per_code"] == pytest.approx(measured[-1], abs=0.02)  # bfloat16's rounding
    assert {"gate_0", "gate_1", "grad_norm", "tokens_per_second", "memory_gib"} <= written[0].keys()
    assert (tmp_path / "pictures" / "step_000004_samples.png").is_file()
    # The checkpoint alone gives the same weights, to the byte.
    with pytest.raises(UserError, match="is a training run: export it without --to"):
        convert.run(str(tmp_path), str(tmp_path / "again"), "janus", merge_lora=True, last=False)
    convert.run(str(tmp_path), str(tmp_path / "again"), "ours", merge_lora=True, last=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "again")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["step"] == 4
    with pytest.raises(UserError, match="--last is for the workdir of a training run"):
        convert.run(str(tmp_path / "export"), str(tmp_path / "more"), "ours", merge_lora=True, last=True)
    # A further training goes on with its blenders.
    further = make_task(workshop.config(folder, {"base": str(tmp_path / "export")})).init_model(nnx.Rngs(1))
    kept = {path: value for path, value in parameters(further).items() if ".blender." in path}
    assert kept
    for path, value in kept.items():
        np.testing.assert_array_equal(value[...], after[path][...], err_msg=path)


@pytest.mark.slow
def test_a_silent_start_and_lora_alone_start_from_the_base(folder):
    silent, control = (make_task(workshop.config(folder, o)) for o in ({"start_silent": True}, {"blend": False}))
    batch, base = first_batch(silent), load_model(silent.options.base)
    expected = bits(control, base, batch)
    assert bits(silent, silent.init_model(nnx.Rngs(0)), batch) == pytest.approx(expected, rel=1e-6)
    assert bits(control, control.init_model(nnx.Rngs(0)), batch) == pytest.approx(expected, rel=1e-6)
    official = make_task(workshop.config(folder))
    assert abs(bits(official, official.init_model(nnx.Rngs(0)), batch) - expected) > 0.01


@pytest.mark.slow
def test_neighbours_are_others_of_those_stored_every_epoch(folder):
    task = make_task(workshop.config(folder))
    stored = task.sets["train"]
    loader = make_loader(task.train_source(), len(stored), seed=0)
    epochs = [next(loader) for _ in range(2)]
    seen = [{int(number): batch["neighbors"][row] for row, number in enumerate(batch["example"])} for batch in epochs]
    changed = 0
    for number in range(len(stored)):
        everything = stored[number]["neighbors"]
        for epoch in seen:
            drawn = epoch[number]
            for position in range(len(drawn)):
                left = list(everything[position])
                for code in drawn[position]:
                    left.remove(code)  # raises where a code is drawn more often than it is stored
        changed += not np.array_equal(seen[0][number], seen[1][number])
    assert changed > len(stored) // 2
    held_out = next(iter(task.eval_batches(4)))["neighbors"]
    for row, neighbors in enumerate(held_out):
        np.testing.assert_array_equal(neighbors, task.sets["valid"][row]["neighbors"][:, : workshop.K])


@pytest.mark.slow
@pytest.mark.long
def test_dropped_captions_silence_the_blenders(folder):
    """With every caption dropped, the loss is that of the unconditional prompt without blending."""
    task = make_task(workshop.config(folder, {"caption_dropout": 0.999999, "lora": {"rank": 2, "dropout": 0.0}}))
    model, batch = task.init_model(nnx.Rngs(0)), first_batch(task)
    loss = task.loss(model, batch, jax.random.key(0))[1]["bits_per_code"]
    control = make_task(workshop.config(folder, {"blend": False}))
    empty = batch | {"prompt_ids": model.unconditional((batch["prompt_ids"], batch["prompt_mask"]))[0]}
    assert float(loss) == pytest.approx(bits(control, load_model(task.options.base), empty), rel=1e-5)


@pytest.mark.slow
def test_a_mesh_trains_as_one_device(folder, tmp_path, monkeypatch):
    """Losses differ by less than 1e-5 of themselves; batches, weights and optimizer state are spread over devices."""
    monkeypatch.setattr(mesh, "SMALLEST_SHARDED", workshop.SPREAD)
    without_pictures(monkeypatch)  # they are drawn on one device in any case
    for name, shape in (("one", MeshConfig(1, 1)), ("mesh", MeshConfig(2, 4))):
        config = workshop.config(folder, mesh=shape)
        train(config, make_task(config), tmp_path / name)
    one, spread = (list(losses(tmp_path / name).values()) for name in ("one", "mesh"))
    np.testing.assert_allclose(spread, one, rtol=1e-5)
    assert split_leaves(tmp_path / "mesh") >= workshop.BLENDER_KERNELS
    assert not split_leaves(tmp_path / "one")


@pytest.mark.slow
def test_the_blenders_form_goes_by_a_devices_own_cells(folder, monkeypatch):
    """Of the mesh in use, not of the host; devices that split the kernels compose together."""
    seen = []
    monkeypatch.setattr(
        blend_ops, "cheaper_composed", lambda hops, positions, width, shares: bool(seen.append((positions, shares)))
    )
    for shape in (MeshConfig(1, 1), MeshConfig(2, 4)):
        task = make_task(workshop.config(folder, mesh=shape))
        model = task.init_model(nnx.Rngs(0))
        with jax.set_mesh(mesh.make_mesh(shape)):
            jax.eval_shape(task.eval_metrics, model, first_batch(task))
    assert seen == [(8 * 144, 1)] * 2 + [(144, 4)] * 2


def first_step(config):
    """Frozen weights, the state after one step, and its metrics."""
    task, devices, optimizer = make_task(config), mesh.make_mesh(config.mesh), make_optimizer(config.optimizer, 4)
    graph, frozen, state = init_state(task, optimizer, config, devices)
    batch = next(make_loader(task.train_source(), config.batch_size, config.seed))
    step = make_train_step(task, graph, optimizer, config)
    return frozen, *step(state, frozen, mesh.put_batch(batch, devices))


@pytest.mark.slow
@pytest.mark.long
def test_bfloat16_trains_as_float32_does_but_for_its_rounding(folder):
    one_device = MeshConfig(1, 1)
    _, _, exact = first_step(workshop.config(folder, mesh=one_device))
    frozen, state, metrics = first_step(workshop.config(folder, mesh=one_device, compute_dtype="bfloat16"))
    assert float(metrics["loss"]) == pytest.approx(float(exact["loss"]), rel=2**-8)
    assert float(metrics["grad_norm"]) == pytest.approx(float(exact["grad_norm"]), rel=2**-5)
    kept = {path: leaf.dtype for path, leaf in by_path(state).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert set(kept.values()) == {np.dtype("float32")}
    for path, leaf in by_path(frozen).items():
        assert leaf.dtype == (jnp.float32 if path.startswith("gen_vision_model") else jnp.bfloat16), path


def test_a_data_key_that_is_not_read_is_refused(folder):
    with pytest.raises(UserError, match="task faid reads only eval_examples"):
        make_task(workshop.config(folder, data=DataConfig(eval_split="test")))


@pytest.mark.slow
@pytest.mark.long
def test_eval_measures_what_training_measures_and_generate_draws_it(folder, tmp_path):
    """Neighbours looked up ahead and live are the same; a model of another tokenizer, or without blenders, is told."""
    task = make_task(workshop.config(folder, {"start_silent": False}))
    model = task.init_model(nnx.Rngs(0))
    for layer in model.language_model.layers:
        layer.attention.merge_lora()
    tuned, plain = str(tmp_path / "tuned"), task.options.base
    save_model(model, tuned)
    retrieval = RetrievalConfig(str(folder / "store"), workshop.STORED, search="dense")
    data = DataSetConfig(workshop.SOURCE, str(folder / "data"))
    config = DrawConfig(plain, retrieval, tuned, data=data, mesh=MeshConfig(1, 1))
    pipeline = open_pipeline(config)
    assert pipeline.methods == ("plain", "daid", "faid", "faid+daid")
    figures = bits_of_examples(pipeline, open_benchmark("emoji_scenes", data, "valid").held_out(12))
    for method, blend in (("plain", False), ("faid", True)):
        reference = make_task(workshop.config(folder, {"blend": blend}))
        batch = jax.tree.map(jnp.asarray, next(iter(reference.eval_batches(12))))
        expected = bits(reference, load_model(tuned if blend else plain), batch)
        assert figures[method].mean() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"'lora' needs another model: give config\.lora_model"):
        open_pipeline(config, ["lora"])
    with pytest.raises(UserError, match="no FAiD blenders"):
        open_pipeline(DrawConfig(plain, retrieval, plain, mesh=MeshConfig(1, 1)), ["faid"])
    generate.run(config, str(tmp_path / "out"), ["a cat"], 0, "faid+daid", 1)
    assert (tmp_path / "out" / "00_faid+daid.png").is_file() and (tmp_path / "out" / "provenance.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faid": {"neighbors": 7}}, r"holds 6 neighbours per position; build a set with a larger k"),
        ({"neighbors": "nowhere"}, "no finished neighbor set"),
        ({"base": "nowhere"}, "no checkpoint folder"),
        ({"faid": {"hops": (3, 1)}}, "rising subset"),
        ({"lora": {"rank": 0}}, "rank=0"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
        ({"daid": {"weight": 2.0}}, "λ"),
        ({"sampling": {"top_p": 0.0}}, r"top_p = 0\.0 is outside"),
        (
            {"retrieval": {"store": "s", "k": 2}},
            r"retrieval\.k=2 gives .* fewer neighbours than .*neighbors=3; raise k",
        ),
    ],
)
def test_options_that_cannot_be_are_named_before_training(folder, options, message):
    with pytest.raises(UserError, match=message):
        make_task(workshop.config(folder, options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 8}, r"a caption of .*neighbors cannot be a prompt: .*too long: .* change .*prompt_length"),
        ({"retrieval": {"store": "nowhere", "k": workshop.K}}, "no finished datastore in nowhere"),
    ],
)
def test_what_the_first_evaluation_would_meet_is_named_before_the_first_step(
    folder, tmp_path, monkeypatch, options, message
):
    config = workshop.config(folder, options)
    with pytest.raises(UserError, match=message):
        train(config, make_task(config), tmp_path)
    assert not losses(tmp_path)
    without_pictures(monkeypatch)
    config = workshop.config(folder, steps=1)  # mended, the same workdir will do
    train(config, make_task(config), tmp_path)
    assert list(losses(tmp_path)) == [1]


@pytest.mark.slow
@pytest.mark.long
def test_folders_may_move_between_a_run_and_its_continuation(folder, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    config = workshop.config(folder, steps=1)
    train(config, make_task(config), tmp_path / "run")
    moved = tmp_path / "moved"
    for name in ("model", "neighbors", "store"):
        shutil.copytree(folder / name, moved / name)
    config = workshop.config(moved, steps=2)
    train(config, make_task(config), tmp_path / "run")
    assert list(losses(tmp_path / "run")) == [1, 2]
    text = json.loads((moved / "model" / "tokenizer.json").read_text())
    (moved / "model" / "tokenizer.json").write_text(json.dumps(text))  # as good, but who knows
    with pytest.raises(UserError, match=r"on another base: base/tokenizer\.json"):
        train(config, make_task(config), tmp_path / "run")
