"""The commands on the embedded checkpoint, end to end, and what they say to bad input."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pixels import find

from arrag_jax import build_datastore, eval, generate
from arrag_jax.config import (
    CaptionConfig,
    DaidConfig,
    DataSetConfig,
    DatastoreConfig,
    DrawConfig,
    MeshConfig,
    RetrievalConfig,
    SamplingConfig,
)
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation.emoji import benchmark
from arrag_jax.evaluation.likelihood import bits_per_code, look_up, score_scenes
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures.canvas import upscale
from arrag_jax.files import sha256_of
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import image_and_cell
from arrag_jax.retrieval.captions import CaptionIndex
from arrag_jax.retrieval.load import load_retriever

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "arrag_jax" / "assets" / "emoji_janus")


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> DrawConfig:
    """The embedded checkpoint with a store of 48 scenes."""
    data = str(tmp_path_factory.mktemp("data"))
    store = str(tmp_path_factory.mktemp("store"))
    build_datastore.run(
        DatastoreConfig(model=MODEL, source="emoji_scenes/tiny", data_dir=data, num_images=48, captions=True),
        workdir=store,
    )
    return DrawConfig(
        model=MODEL,
        retrieval=RetrievalConfig(store=store, k=16),
        daid=DaidConfig(weight=0.3),
        sampling=SamplingConfig(cfg_scale=2.0),
        data=DataSetConfig(name="emoji_scenes/tiny", data_dir=data),
        mesh=MeshConfig(1, 1),
        batch_size=4,
    )


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run_generate(config: DrawConfig, out: Path, prompt=("a cat", "two dogs"), method="", scale=1, **flags) -> None:
    generate.run(config, workdir=str(out), prompt=list(prompt), test_prompts=0, method=method, scale=scale, **flags)


def test_generate_draws_every_prompt_and_says_where_codes_came_from(config, tmp_path):
    run_generate(config, tmp_path)
    grid = read(tmp_path / "grid.png")
    records = json.loads((tmp_path / "provenance.json").read_text())
    assert [record["prompt"] for record in records] == ["a cat", "two dogs"]
    store = open_pipeline(config, ["daid"]).store
    for i, record in enumerate(records):
        picture = read(tmp_path / f"{i:02d}_daid.png")
        tiles = np.lib.stride_tricks.sliding_window_view(grid, picture.shape)[:, :, 0]
        assert (tiles == picture).all((2, 3, 4)).any()  # the grid holds the picture itself
        cells = record["cells"]
        assert record["share_among_neighbors"] == round(np.mean([cell["rank"] is not None for cell in cells]), 4)
        for cell in cells:
            if cell["rank"] is not None:  # the stored image holds that code there
                assert cell["code"] == store.codes[cell["image"]].reshape(-1)[cell["image_cell"]]
        assert record["sources"][0]["source"] == store.sources[record["sources"][0]["image"]]
        page = read(tmp_path / f"provenance_{i:02d}_daid.png")
        find(page, upscale(picture, 6))  # the picture itself stands in its page


def test_weight_zero_draws_the_plain_pictures_and_credits_no_draw_to_retrieval(config, tmp_path, capsys):
    nothing = dataclasses.replace(config, daid=DaidConfig(weight=0.0))
    run_generate(nothing, tmp_path)
    for i in (0, 1):
        np.testing.assert_array_equal(read(tmp_path / f"{i:02d}_daid.png"), read(tmp_path / f"{i:02d}_plain.png"))
    records = json.loads((tmp_path / "provenance.json").read_text())
    assert all(record["share_retrieved"] == 0 < record["share_among_neighbors"] for record in records)
    assert "daid: 0.0% of the draws made by retrieval" in capsys.readouterr().out


def test_a_picture_does_not_depend_on_its_batch(config, tmp_path):
    run_generate(config, tmp_path / "two", method="daid", provenance=False)
    assert not list((tmp_path / "two").glob("provenance*"))  # as told
    run_generate(dataclasses.replace(config, seed=1), tmp_path / "one", prompt=["two dogs"], method="daid")
    np.testing.assert_array_equal(read(tmp_path / "two" / "01_daid.png"), read(tmp_path / "one" / "00_daid.png"))


def test_likelihood_equals_the_codes_scored_one_scene_at_a_time(config):
    pipe = open_pipeline(config, ["plain", "daid"])
    scenes = [scene("valid", i) for i in range(5)]
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in scenes]
    scored = score_scenes(pipe.model, look_up(pipe.model, pipe.text, examples, pipe.retriever, batch_size=2))
    model, total = pipe.model, 0.0
    for example in examples:
        codes, _ = model.encode_images(from_uint8(example["image"][None]))
        logits = np.asarray(model.score(*pipe.text([example["caption"].decode()])[:1], np.asarray(codes)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(log_p[0], np.asarray(codes)[0][:, None], 1).mean() / np.log(2)
    assert bits_per_code(scored, Plain()) == pytest.approx(total / 5, abs=1e-4)
    assert bits_per_code(scored, Daid(0.0, 0.1)) == pytest.approx(bits_per_code(scored, Plain()), abs=1e-6)


def test_a_store_of_the_scenes_themselves_lowers_their_likelihood_cost(config):
    """Retrieval adds knowledge. The weight is small, for a sure prior pays for it in every cell."""
    pipe = open_pipeline(config, ["plain", "daid"])
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("store", i) for i in range(12))]
    scored = score_scenes(pipe.model, look_up(pipe.model, pipe.text, examples, pipe.retriever))
    assert bits_per_code(scored, Daid(0.1, 0.001, "sum")) < bits_per_code(scored, Plain()) - 0.01


def test_pictures_of_limited_methods_come_from_images_of_the_caption(config, tmp_path):
    limited = CaptionConfig(images=3, static_images=1, daid=DaidConfig(weight=0.3))
    config = dataclasses.replace(config, caption=limited, methods=("caption", "static"))
    run_generate(config, tmp_path, method="caption")
    pipe = open_pipeline(config)
    assert pipe.methods == ("static", "caption")
    index = CaptionIndex(pipe.store.captions)
    records = json.loads((tmp_path / "provenance.json").read_text())
    assert [record["prompt"] for record in records] == ["a cat", "two dogs"]
    for record in records:
        images = index.nearest([record["prompt"]], 3)
        assert {cell["image"] for cell in record["cells"]} - {None} <= set(images[0].tolist())
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("valid", i) for i in range(3))]
    limit = functools.partial(pipe.retriever_for, "static")
    (found,) = look_up(pipe.model, pipe.text, examples, None, limit=limit)
    images, _ = image_and_cell(np.asarray(found.neighbors.id).reshape(3, -1), *pipe.model.grid)
    for i, example in enumerate(examples):
        nearest = index.nearest([example["caption"].decode()], 1)
        assert set(images[i]) - {-1} == set(nearest[0].tolist())


def run_eval(
    config: DrawConfig, out: Path, num_scenes: int, num_prompts: int = 0, split: str = "valid", mode=""
) -> None:
    modes = {name: name == mode for name in ("sweep", "scaling")}
    eval.run(config, str(out), "emoji_scenes", split, num_prompts, num_scenes, **modes)


@pytest.mark.slow
def test_eval_writes_its_figures_and_true_scenes_score_best(config, tmp_path, capsys):
    run_eval(config, tmp_path, 12, 12, "test")
    results = json.loads((tmp_path / "results.json").read_text())
    bits, objects = results["bits_per_code"], results["object_score"]
    assert set(bits) == {"plain", "daid"} and set(objects) == {"true", "reconstruction", "plain", "daid"}
    assert all(set(row) == {"mean", "std", "gain"} for row in bits.values())
    assert all({"mean", "std", "families"} <= set(row) for row in objects.values())
    gain = bits["plain"]["mean"] - bits["daid"]["mean"]
    assert bits["daid"]["gain"]["mean"] == pytest.approx(gain) and bits["plain"]["gain"] == {"mean": 0.0, "std": 0.0}
    assert objects["true"]["mean"] == 1.0
    for row in objects.values():
        assert row["mean"] == pytest.approx(np.mean(list(row["families"].values())))
    assert "bits a code" in capsys.readouterr().out
    run_eval(dataclasses.replace(config, methods=("daid",)), tmp_path / "alone", 12, split="test")
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert alone["bits_per_code"]["daid"] == {name: bits["daid"][name] for name in ("mean", "std")}


def test_sweep_and_scaling_measure_what_each_setting_gives_alone(config, tmp_path, capsys, monkeypatch):
    pipe = open_pipeline(config, ["daid"])
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("valid", i) for i in range(3))]

    def bits(policy: Daid | Plain, **retrieval) -> float:
        asked, tokenizer = dataclasses.replace(config.retrieval, **retrieval), pipe.model.fingerprint
        _, retriever = load_retriever(asked, tokenizer)
        return bits_per_code(score_scenes(pipe.model, look_up(pipe.model, pipe.text, examples, retriever)), policy)

    plain = bits(Plain())
    monkeypatch.setattr(benchmark, "NEIGHBORS", (16, 64))
    run_eval(config, tmp_path, 3, mode="sweep")
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep["plain"] == pytest.approx(plain, abs=1e-6)
    maps = [(record["reduction"], record["k"]) for record in sweep["maps"]]
    assert maps == [("max", 16), ("max", 64), ("sum", 16), ("sum", 64)]
    assert all((tmp_path / f"sweep_{reduction}_k{k}.png").is_file() for reduction, k in maps)
    policy, gain = Daid(sweep["weights"][3], sweep["temperatures"][2], "sum"), sweep["maps"][2]["gain"][3][2]
    assert gain == pytest.approx(plain - bits(policy), abs=1e-5)
    capsys.readouterr()
    run_eval(config, tmp_path, 3, mode="scaling")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [[images, 110 * images] for images in (3, 12, 48)]
    expected = bits(pipe.policy("daid"), num_images=12, search="dense")
    assert rows[1][2:] == pytest.approx([plain, expected, plain - expected], abs=1e-4)


def test_methods_that_choose_images_need_no_index(config, tmp_path):
    for path in Path(config.retrieval.store).iterdir():
        if path.is_file():
            os.symlink(path, tmp_path / path.name)
    bare = changed(config, "retrieval", store=str(tmp_path))
    pipe = open_pipeline(bare, ["plain", "static", "caption"])
    assert pipe.retriever is None and pipe.store.num_images == 48
    with pytest.raises(UserError, match="index"):
        open_pipeline(bare, ["daid"])


def test_the_dtype_is_that_of_the_model_and_not_of_its_tokenizer(config):
    pipe = open_pipeline(dataclasses.replace(config, dtype="bfloat16"), ["plain", "daid"])
    assert pipe.model.gen_head.layers[0].weight.dtype == jnp.bfloat16 and pipe.model.codebook.dtype == jnp.float32
    ((_, _, drawn),) = pipe.draw(["a cat"], "plain", np.array([3]))
    model, (ids, mask) = load_model(MODEL, "bfloat16"), pipe.text(["a cat"])
    expected = sample(model, ids, seed=np.array([3]), cfg_scale=config.sampling.cfg_scale, prompt_mask=mask)
    np.testing.assert_array_equal(drawn.codes, expected.codes)


def test_a_second_run_finds_the_loops_without_host_calls_compiled(config):
    """All that is compiled for plain and dense drawing comes from the cache on disk when it is met again."""
    pipe = open_pipeline(changed(config, "retrieval", search="dense"), ["plain", "daid"])
    events = []
    listen = lambda event, **_: events.append(event.rpartition("/")[2])  # noqa: E731
    for again in (False, True):
        if again:
            jax.clear_caches()
            jax.monitoring.register_event_listener(listen)
        for method in ("plain", "daid"):
            list(pipe.draw(["a cat", "two dogs"], method, np.arange(2)))
    jax.monitoring.unregister_event_listener(listen)
    assert events.count("cache_hits") == events.count("compile_requests_use_cache") > 10


def changed(config: DrawConfig, where: str, **fields) -> DrawConfig:
    return dataclasses.replace(config, **{where: dataclasses.replace(getattr(config, where), **fields)})


@pytest.mark.parametrize(
    ("where", "fields", "message"),
    [
        ("daid", {"weight": 1.5}, r"λ = 1.5 is outside \[0, 1\]"),
        ("daid", {"temperature": 0.0}, "τ = 0.0 must be above 0"),
        ("daid", {"reduction": "all"}, "choose max"),
        ("retrieval", {"k": 10**6}, "k=1000000 neighbours asked of 5280 stored patches"),
        ("retrieval", {"store": "no/such/store"}, "no finished datastore in no/such/store"),
        ("retrieval", {"keys": "latent"}, "latent"),
    ],
)
def test_settings_that_cannot_be(config, tmp_path, where, fields, message):
    with pytest.raises(UserError, match=message):
        run_generate(changed(config, where, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "method", "message"),
    [
        ([], "", "nothing to draw"),
        ([" "], "", "empty"),
        (["a zebra"], "", "does not know 'zebra'; it knows: a above"),
        (["a cat " * 6], "plain", "prompt too long: 18 tokens, at most 16"),
        (["a cat"], "faid", "--method='faid' is not what these models can do: plain, static, daid, caption; give"),
    ],
)
def test_prompts_and_methods_that_cannot_be(config, tmp_path, prompt, method, message):
    with pytest.raises(UserError, match=message):
        run_generate(config, tmp_path / "out", prompt, method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_scenes", "num_prompts", "mesh", "message"),
    [
        (2, 0, MeshConfig(1, 1), "--num_scenes=2 must be at least 3"),
        (3, -1, MeshConfig(1, 1), "--num_prompts=-1 must be at least 0"),
        (3, 0, MeshConfig(2, 1), "eval measures on one device; leave config.mesh out"),
        (65, 0, MeshConfig(), r"emoji_scenes/tiny has no valid\[:65\]: valid holds 64 scenes"),
    ],
)
def test_figures_that_cannot_be_measured(config, tmp_path, num_scenes, num_prompts, mesh, message):
    with pytest.raises(UserError, match=message):
        run_eval(dataclasses.replace(config, mesh=mesh), tmp_path, num_scenes, num_prompts)


def test_a_scale_below_one_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="--scale=0 must be at least 1"):
        run_generate(DrawConfig("no model", RetrievalConfig("no store")), tmp_path / "out", scale=0)


def test_a_store_of_another_tokenizer_is_refused(config, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for path in Path(config.retrieval.store).iterdir():
        os.symlink(path, store / path.name)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["settings"]["fingerprint"] = "0" * 16
    (store / "manifest.json").unlink()
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was made by tokenizer 0000000000000000"):
        run_generate(changed(config, "retrieval", store=str(store)), tmp_path / "out")


def test_the_embedded_checkpoint_is_what_its_manifest_says():
    manifest = json.loads((Path(MODEL) / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in Path(MODEL).iterdir())
    assert size <= 12 * 2**20
    assert sha256_of(Path(MODEL) / "model.safetensors") == manifest["sha256"]
    model = load_model(MODEL)
    assert model.fingerprint == manifest["tokenizer_fingerprint"]
    truth = np.stack([render(scene("valid", i)) for i in range(64)])
    codes, _ = model.encode_images(from_uint8(truth))
    decoded = np.asarray(model.decode_codes(np.asarray(codes), *model.grid))
    error = jnp.mean((decoded - from_uint8(truth)) ** 2, axis=(1, 2, 3))
    psnr = float(jnp.mean(10 * jnp.log10(4.0 / error)))
    assert psnr >= 26.0 and psnr == pytest.approx(manifest["figures"]["psnr_db"], abs=1.0)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=children.alone(), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arrag_jax.generate", "--config=configs/emoji_daid.py", "--config.daid.wieght=0.1"], "did you mean 'weight'"),
        (["arrag_jax.generate", "--config=configs/emoji_daid.py", "--promt=a cat"], "unknown argument '--promt=a cat'"),
        (["arrag_jax.eval", "--config=configs/nothing.py"], "config file configs/nothing.py does not"),
        (["arrag_jax.train", "--config=configs/emoji_prior.py"], "missing --workdir"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, message):
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and message in result.stderr
