"""``eval`` on the embedded checkpoint, end to end; what it measures with; what it says to bad input."""

import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax import eval
from arrag_jax.config import DrawConfig, MeshConfig, RetrievalConfig
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation import benchmarks, measure, sweeps
from arrag_jax.evaluation.likelihood import bits_per_code, look_up, score_scenes
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.files import sha256_of
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.vq import from_uint8
from arrag_jax.retrieval.load import load_retriever
from helpers import children, drawings
from helpers.drawings import MODEL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DrawConfig:
    return drawings.make_config(tmp_path_factory)


@pytest.mark.slow
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
    assert "bits per code" in capsys.readouterr().out
    run_eval(dataclasses.replace(config, methods=("daid",)), tmp_path / "alone", 12, split="test")
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert alone["bits_per_code"]["daid"] == {name: bits["daid"][name] for name in ("mean", "std")}


@pytest.mark.slow
@pytest.mark.long
def test_sweep_and_scaling_measure_what_each_setting_gives_alone(config, tmp_path, capsys, monkeypatch):
    pipe = open_pipeline(config, ["daid"])
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("valid", i) for i in range(3))]

    def bits(policy: Daid | Plain, **retrieval) -> float:
        asked, tokenizer = dataclasses.replace(config.retrieval, **retrieval), pipe.model.fingerprint
        _, retriever = load_retriever(asked, tokenizer)
        return bits_per_code(score_scenes(pipe.model, look_up(pipe.model, pipe.text, examples, retriever)), policy)

    plain = bits(Plain())
    monkeypatch.setattr(sweeps, "NEIGHBORS", (16, 64))
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
    rows = [[float(position) for position in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [[images, 110 * images] for images in (3, 12, 48)]
    expected = bits(pipe.policy("daid"), num_images=12, search="dense")
    assert rows[1][2:] == pytest.approx([plain, expected, plain - expected], abs=1e-4)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("benchmark", "split", "message"),
    [
        ("emoji_scene", "test", "--benchmark='emoji_scene' is unknown; choose one of emoji_scenes"),
        ("emoji_scenes", "store", "--split='store' of emoji_scenes is unknown; choose test or valid"),
    ],
)
def test_a_benchmark_that_is_not_there_is_named_before_anything_is_loaded(tmp_path, benchmark, split, message):
    config = DrawConfig("no model", RetrievalConfig("no store"))
    with pytest.raises(UserError, match=message):
        eval.run(config, str(tmp_path / "out"), benchmark, split, 0, 3, sweep=False, scaling=False)
    assert not (tmp_path / "out").exists()


class Brightness:
    """A benchmark of one's own: how bright images are; without true images and without held-out examples."""

    splits = ("test",)
    images_per_prompt = 2
    score_name = "brightness"
    most_alive = 0  # images of the run that were in memory at once, in batches

    def __init__(self, data, split):
        del data, split

    def prompts(self, number):
        return ["a cat", "two dogs", "three cats", "a dog", "a star", "two cups"][:number]

    def true_images(self, numbers):
        del numbers

    def held_out(self, number):
        del number
        return ()

    def score(self, repeats):
        seen, means, order = [], [], []
        for batches in repeats:
            for numbers, images in batches:
                seen.append(weakref.ref(images))
                alive = sum(ref() is not None for ref in seen)
                Brightness.most_alive = max(Brightness.most_alive, alive)
                means += images.mean((1, 2, 3)).tolist()
                order += numbers.tolist()
        return {"means": means, "order": order}

    def groups(self, number):
        return [None] * number

    def table(self, scores):
        return "\n".join(f"{name} {np.mean(row['means']):.3f}" for name, row in scores.items())


@pytest.mark.slow
def test_a_benchmark_of_ones_own_is_one_line_and_never_holds_a_whole_run(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "brightness", f"{__name__}:Brightness")
    config = dataclasses.replace(config, methods=("plain",), batch_size=2)
    eval.run(config, str(tmp_path), "brightness", "test", 99, 3, sweep=False, scaling=False)
    results = json.loads((tmp_path / "results.json").read_text())
    row = results["brightness"]["plain"]
    assert capsys.readouterr().out.splitlines()[-1] == f"plain {np.mean(row['means']):.3f}"
    assert results["bits_per_code"] == {} and results["num_prompts"] == 6 and row["order"] == [*range(6)] * 2
    assert Brightness.most_alive == 1  # the batch that is being scored
    pipe, prompts = open_pipeline(config), Brightness(None, None).prompts(6)
    for repeat, means in enumerate(np.split(np.array(row["means"]), 2)):
        seeds = config.seed + repeat * measure.SEED_STEP + np.arange(6)
        images = np.concatenate([batch.images for batch in pipe.draw(prompts, "plain", seeds)])
        np.testing.assert_allclose(images.mean((1, 2, 3)), means)
    with pytest.raises(UserError, match="--split='valid' of brightness is unknown; choose test"):
        eval.run(config, str(tmp_path), "brightness", "test", 6, 3, sweep=True, scaling=False)


@pytest.mark.slow
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


@pytest.mark.slow
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
