"""``generate`` on the embedded checkpoint, end to end; the pipeline that it draws with; what it says to bad input."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arrag_jax import generate
from arrag_jax.config import CaptionConfig, DaidConfig, DrawConfig, RetrievalConfig
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.loop import sample
from arrag_jax.decode.methods import METHODS, Kind, Method, Search
from arrag_jax.decode.policies import Daid
from arrag_jax.errors import UserError
from arrag_jax.evaluation import generation
from arrag_jax.evaluation.likelihood import look_up
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures.canvas import upscale
from arrag_jax.models.checkpoint import load_model
from arrag_jax.ops.grid import image_and_position
from arrag_jax.retrieval.captions import TermIndex
from helpers import drawings
from helpers.drawings import MODEL, changed
from helpers.pixels import find


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DrawConfig:
    return drawings.make_config(tmp_path_factory)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def run_generate(config: DrawConfig, out: Path, prompt=("a cat", "two dogs"), method="", scale=1, **flags) -> None:
    generate.run(config, workdir=str(out), prompt=list(prompt), test_prompts=0, method=method, scale=scale, **flags)


@pytest.mark.slow
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
        positions = record["cells"]
        assert record["share_among_neighbors"] == round(
            np.mean([position["rank"] is not None for position in positions]), 4
        )
        for position in positions:
            if position["rank"] is not None:  # the stored image holds that code there
                assert position["code"] == store.codes[position["image"]].reshape(-1)[position["image_cell"]]
        assert record["sources"][0]["source"] == store.sources[record["sources"][0]["image"]]
        page = read(tmp_path / f"provenance_{i:02d}_daid.png")
        find(page, upscale(picture, 6))  # the picture itself stands in its page


@pytest.mark.slow
def test_weight_zero_draws_the_plain_pictures_and_credits_no_draw_to_retrieval(config, tmp_path, capsys):
    nothing = dataclasses.replace(config, daid=DaidConfig(weight=0.0))
    run_generate(nothing, tmp_path)
    for i in (0, 1):
        np.testing.assert_array_equal(read(tmp_path / f"{i:02d}_daid.png"), read(tmp_path / f"{i:02d}_plain.png"))
    records = json.loads((tmp_path / "provenance.json").read_text())
    assert all(record["share_retrieved"] == 0 < record["share_among_neighbors"] for record in records)
    assert "daid: 0.0% of the draws made by retrieval" in capsys.readouterr().out


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(config, tmp_path):
    run_generate(config, tmp_path / "two", method="daid", provenance=False)
    assert not list((tmp_path / "two").glob("provenance*"))  # as told
    run_generate(dataclasses.replace(config, seed=1), tmp_path / "one", prompt=["two dogs"], method="daid")
    np.testing.assert_array_equal(read(tmp_path / "two" / "01_daid.png"), read(tmp_path / "one" / "00_daid.png"))


@pytest.mark.slow
def test_pictures_of_limited_methods_come_from_images_of_the_caption(config, tmp_path):
    limited = CaptionConfig(images=3, static_images=1, daid=DaidConfig(weight=0.3))
    config = dataclasses.replace(config, caption=limited, methods=("caption", "static"))
    run_generate(config, tmp_path, method="caption")
    pipe = open_pipeline(config)
    assert pipe.methods == ("static", "caption")
    index = TermIndex(pipe.store.captions)
    records = json.loads((tmp_path / "provenance.json").read_text())
    assert [record["prompt"] for record in records] == ["a cat", "two dogs"]
    for record in records:
        images = index.nearest([record["prompt"]], 3)
        assert {position["image"] for position in record["cells"]} - {None} <= set(images[0].tolist())
    examples = [{"image": render(s), "caption": s.caption.encode()} for s in (scene("valid", i) for i in range(3))]
    limit = functools.partial(pipe.retriever_for, "static")
    (found,) = look_up(pipe.model, pipe.text, examples, None, limit=limit)
    images, _ = image_and_position(np.asarray(found.neighbors.id).reshape(3, -1), *pipe.model.grid)
    for i, example in enumerate(examples):
        nearest = index.nearest([example["caption"].decode()], 1)
        assert set(images[i]) - {-1} == set(nearest[0].tolist())


def test_methods_that_choose_images_need_no_index(config, tmp_path):
    for path in Path(config.retrieval.store).iterdir():
        if path.is_file():
            os.symlink(path, tmp_path / path.name)
    bare = changed(config, "retrieval", store=str(tmp_path))
    pipe = open_pipeline(bare, ["plain", "static", "caption"])
    assert pipe.retriever is None and pipe.store.num_images == 48
    with pytest.raises(UserError, match="index"):
        open_pipeline(bare, ["daid"])


@pytest.mark.slow
def test_the_dtype_is_that_of_the_model_and_not_of_its_tokenizer(config):
    pipe = open_pipeline(dataclasses.replace(config, dtype="bfloat16"), ["plain", "daid"])
    assert pipe.model.gen_head.layers[0].weight.dtype == jnp.bfloat16 and pipe.model.codebook.dtype == jnp.float32
    ((_, _, drawn),) = pipe.draw(["a cat"], "plain", np.array([3]))
    model, (ids, mask) = load_model(MODEL, "bfloat16"), pipe.text(["a cat"])
    expected = sample(model, ids, seed=np.array([3]), cfg_scale=config.sampling.cfg_scale, prompt_mask=mask)
    np.testing.assert_array_equal(drawn.codes, expected.codes)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("where", "fields", "message"),
    [
        ("daid", {"weight": 1.5}, r"λ = 1.5 is outside \[0, 1\]"),
        ("daid", {"temperature": 0.0}, "τ = 0.0 must be above 0"),
        ("daid", {"reduction": "all"}, "choose max"),
        ("retrieval", {"k": 10**6}, "k=1000000 neighbours were requested from 5280 stored patches"),
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
        (["a cat"], "diad", "--method='diad' is unknown; choose one of plain, static, daid, caption, hidden"),
        (
            ["a cat"],
            "faid",
            "--method='faid' needs another model: give config.faid_model, or choose one of plain",
        ),
    ],
)
def test_prompts_and_methods_that_cannot_be(config, tmp_path, prompt, method, message):
    with pytest.raises(UserError, match=message):
        run_generate(config, tmp_path / "out", prompt, method)
    assert not (tmp_path / "out").exists()


def test_a_scale_below_one_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="--scale=0 must be at least 1"):
        run_generate(DrawConfig("no model", RetrievalConfig("no store")), tmp_path / "out", scale=0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_method_of_ones_own_is_one_line_of_the_table(config, tmp_path, monkeypatch):
    half = Method(Kind.BASE, lambda c: Daid(c.daid.weight / 2, c.daid.temperature), Search.STORE, by_default=False)
    monkeypatch.setitem(METHODS, "half", half)
    assert "half" not in open_pipeline(config).methods
    run_generate(config, tmp_path / "half", method="half")
    weaker = changed(config, "daid", weight=config.daid.weight / 2)
    run_generate(weaker, tmp_path / "daid", method="daid", provenance=False)
    for i in (0, 1):
        own = read(tmp_path / "half" / f"{i:02d}_half.png")
        np.testing.assert_array_equal(own, read(tmp_path / "daid" / f"{i:02d}_daid.png"))
    assert (tmp_path / "half" / "provenance_00_half.png").is_file()


@pytest.mark.slow
def test_test_prompts_are_those_of_the_configs_data_set(config, tmp_path):
    generate.run(config, str(tmp_path / "out"), ["a cat"], test_prompts=2, method="plain", scale=1)
    prompts = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["prompts"]
    assert prompts == ["a cat", *(scene("test", i).caption for i in range(2))]
    other = changed(config, "data", source="photos/large")
    with pytest.raises(UserError, match=r"config\.data\.source='photos/large' has no test prompts.* emoji_scenes"):
        generate.run(other, str(tmp_path / "other"), ["a cat"], test_prompts=2, method="plain", scale=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_grid_shows_the_first_prompts_alone(config, tmp_path, monkeypatch):
    run_generate(config, tmp_path / "one", ["a cat"], method="plain")
    monkeypatch.setattr(generation, "GRID_ROWS", 1)
    run_generate(config, tmp_path / "two", method="plain")
    assert (tmp_path / "two" / "01_plain.png").is_file()
    np.testing.assert_array_equal(read(tmp_path / "two" / "grid.png"), read(tmp_path / "one" / "grid.png"))
