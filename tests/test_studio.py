"""Laws of what the studio shows, without a page."""

import dataclasses
import shlex

import numpy as np
import pytest
from PIL import Image

from arrag_jax import studio as studio_command
from arrag_jax.config import SamplingConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.web import studio
from arrag_jax.web.shelf import Shelf
from arrag_jax.web.watched import Watched
from arrag_jax.work import run_work
from helpers import drawings, running


@pytest.mark.parametrize(
    ("x", "y", "position"), [(0, 0, 0), (99, 0, 4), (0, 39, 15), (20, 10, 6), (-5, 400, 15), (1000, -1, 4)]
)
def test_a_pixel_belongs_to_a_position(x, y, position):
    assert studio.position_at(x, y, (40, 100, 3), (4, 5)) == position


def test_a_frame_surrounds_its_position_alone():
    image = np.zeros((16, 20, 3), np.uint8)
    whole = studio.marked(image, 6, (4, 5))
    scale = studio.SIDE // 20
    changed = np.argwhere(whole.any(2))
    top, left = changed.min(0)
    bottom, right = changed.max(0)
    assert (top, left) == (4 * scale - studio.FRAME, 4 * scale - studio.FRAME)
    assert (bottom, right) == (8 * scale + studio.FRAME - 1, 8 * scale + studio.FRAME - 1)
    assert not whole[5 * scale, 5 * scale].any()


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), studio_command.EMBEDDED),
        (("--config=a.py", "--port=1"), "a.py"),
        (("--port=1", "--config", "b.py"), "b.py"),
    ],
)
def test_the_config_file_of_a_command_line_is_found(arguments, config):
    assert studio_command._config_file(["studio", *arguments]) == config


def test_an_ask_has_limits():
    with pytest.raises(UserError, match="10,000 characters, at most 1,000"):
        studio.Ask("a" * 10_000, "caption", 0, 0.1, 0.1, SamplingConfig())
    with pytest.raises(UserError, match="seed=-1"):
        studio.Ask("a", "caption", -1, 0.1, 0.1, SamplingConfig())
    with pytest.raises(UserError, match="K=0"):
        studio.Ask("a", "caption", 0, 0.1, 0.1, SamplingConfig(), k=0)


@pytest.mark.slow
def test_a_drawing_is_what_its_command_draws_and_every_cell_is_told(tmp_path, tmp_path_factory, capsys, monkeypatch):
    config = drawings.make_config(tmp_path_factory)
    retrieval = dataclasses.replace(config.retrieval, search="dense")
    pipeline = open_pipeline(dataclasses.replace(config, retrieval=retrieval), ["plain", "caption"])
    sampling = SamplingConfig(1.7, temperature=0.9, top_p=0.8)
    ask = studio.Ask("a cat", "caption", 5, 0.4, 0.1, sampling, k=3)
    *forming, drawn = studio.draw(pipeline, ask)
    assert [(part.rows, part.height) for part in forming] == [(row, 12) for row in range(1, 13)]
    np.testing.assert_array_equal(forming[-1].picture, drawn.picture)
    words = shlex.split(studio.command(drawn, "emoji_daid"))[3:]
    kept = [f"--workdir={tmp_path}" if word.startswith("--workdir") else word for word in words]
    model = [f"--config.model={drawings.MODEL}", "--config.mesh.data=1"]
    assert running.run(capsys, monkeypatch, "generate", *kept, *model).code == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "00_caption.png")), drawn.picture)
    for position, cell in enumerate(drawn.record["cells"]):
        image, told, name = studio.origin(drawn, position)
        assert (image is None) == (cell["image"] is None) == (not name) and f"code {cell['code']}." in told
    assert f"{drawn.record['nearest_in_place']['share_equal']:.0%}" in studio.audit(drawn.record)
    assert len(studio.sources(drawn)) == len(drawn.record["sources"])
    texts = {path.rpartition("/")[2]: path for path in studio.files(drawn)}
    assert texts.keys() == {"plain.png", "caption.png", "provenance.png", "provenance.json"}
    assert Image.open(texts["caption.png"]).text["seed"] == "5"


@pytest.mark.long
@pytest.mark.slow
def test_a_visitors_pictures_become_the_open_store(tmp_path, tmp_path_factory):
    config = drawings.make_config(tmp_path_factory)
    retrieval = dataclasses.replace(config.retrieval, search="dense")
    shelf = Shelf(dataclasses.replace(config, retrieval=retrieval), ["plain", "daid"], tmp_path / "studio")
    rng, uploads = np.random.default_rng(0), []
    for number in range(3):
        uploads.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(uploads[-1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    *_, report = shelf.build("mine", "", [*uploads, str(tmp_path / "broken.png")])
    assert "3 images" in report and "broken.png`: not an image that PIL reads" in report
    assert shelf.pipeline.datastore.num_images == 3 and len(shelf.stores()) == 1
    gone = shelf.pipeline.datastore.sources[1]
    for names, message in ((gone + "\nnobody.png", "nothing was"), (" \n", "no image is named")):
        with pytest.raises(UserError, match=message):
            shelf.forget(names)
    assert f"forgotten: `{gone}`" in shelf.forget(f"{gone}\n")
    drawn = next(shelf.pipeline.draw(["a cat"], "daid", np.array([0]))).drawn
    per_image = shelf.pipeline.datastore.num_patches // 3
    assert not np.any((drawn.source >= 0) & (drawn.source // per_image == 1))
    for name, source in (("../x", "a"), ("", "a"), ("other", "")):
        with pytest.raises(UserError):
            list(shelf.build(name, source))
    with pytest.raises(UserError, match="no finished datastore"):
        shelf.open(str(tmp_path))
    assert shelf.pipeline.datastore.num_images == 3


@pytest.mark.long
@pytest.mark.slow
def test_a_store_offers_the_methods_that_it_has_captions_and_keys_for(tmp_path, tmp_path_factory):
    shelf = Shelf(drawings.make_config(tmp_path_factory), ["plain", "caption", "gated+caption"], tmp_path / "studio")
    assert shelf.pipeline.methods == ("plain", "caption")
    assert "not open: gated+caption, because the store has no hidden keys" in shelf.report()
    rng, uploads = np.random.default_rng(0), []
    for folder in ("a", "b"):  # files of one name
        (tmp_path / folder).mkdir()
        uploads.append(str(tmp_path / folder / "cat.png"))
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(uploads[-1])
    *lines, report = shelf.build("wordless", "", uploads)
    assert "2 images" in report and "of 2 images" in "".join(lines)
    assert shelf.pipeline.methods == ("plain", "daid") and "no captions and no hidden keys" in report
    assert next(shelf.pipeline.draw(["a cat"], "daid", np.array([0]))).drawn.source.max() >= 0
    with pytest.raises(UserError, match="is a finished store already"):
        list(shelf.build("wordless", "", uploads))
    (tmp_path / "a" / "cat.txt").write_text("a cat")
    *_, report = shelf.build("told", str(tmp_path / "a"))
    assert shelf.pipeline.methods == ("plain", "caption", "gated+caption") and "not open" not in report
    (tmp_path / "a" / "cat.txt").write_text("a grandmother")
    *_, report = shelf.build("unknown", str(tmp_path / "a"))
    assert shelf.pipeline.methods == ("plain", "caption") and "does not know 'grandmother'" in report


def test_a_build_says_how_much_is_left():
    watched = Watched()
    assert watched.told() == ""
    work = run_work([1, 2], lambda: lambda item, report: report.count(5), {0: 5, 1: 5, 2: 5}, "s", engine=watched)
    told = [watched.told() for _ in work]
    assert [line.partition(" images")[0] for line in told] == ["s: 10 of 15", "s: 15 of 15"]
    assert all(line.endswith(" s left") for line in told)


def test_equal_pictures_are_never_saved_to_the_same_file(tmp_path):
    """A file that is written again while it is sent ends before its announced length."""
    pytest.importorskip("gradio")
    from gradio import processing_utils

    from arrag_jax.web.page import fresh

    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    paths = [processing_utils.save_pil_to_cache(fresh(image), str(tmp_path), format="png") for _ in range(2)]
    assert paths[0] != paths[1]
    for path in paths:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), studio.enlarged(image))
