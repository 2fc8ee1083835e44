"""The folder of a run of ``generate``: it goes on where it was, shows one run alone, and tells how it was made."""

from pathlib import Path

import pytest
from PIL import Image

from arrag_jax import generate
from arrag_jax.config import DaidConfig, DrawConfig, MeshConfig, RetrievalConfig, SamplingConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import generation
from arrag_jax.files import exclusive_lock
from helpers import drawings
from helpers.drawings import MODEL, PROMPTS, bytes_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Of 24 scenes, with a ScaNN index."""
    return drawings.make_store(tmp_path_factory)


def config_of(store: str = "") -> DrawConfig:
    retrieval = RetrievalConfig(store, 16, search="dense")
    return DrawConfig(
        MODEL, retrieval, daid=DaidConfig(0.3), sampling=SamplingConfig(1.5), mesh=MeshConfig(1, 1), batch_size=2
    )


def draw(out: Path, prompts: list[str], store: str = "", method: str = "plain") -> None:
    generate.run(config_of(store), str(out), prompts, test_prompts=0, method=method, scale=2)


@pytest.mark.slow
def test_another_run_in_the_same_folder_leaves_nothing_of_the_one_before(store, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    draw(tmp_path, PROMPTS[:3], store, "daid")
    assert {"02_daid.png", "provenance_02_daid.png", "provenance.json"} <= set(bytes_of(tmp_path))
    capfd.readouterr()
    draw(tmp_path, PROMPTS[1:3])
    assert "of another run (prompts, methods differ)" in capfd.readouterr().err
    assert set(bytes_of(tmp_path)) == {"00_plain.png", "01_plain.png", "grid.png", "run.json", "notes.txt"}


@pytest.mark.slow
def test_what_is_missing_of_a_finished_run_is_drawn_and_nothing_else(store, tmp_path, monkeypatch):
    draw(tmp_path, PROMPTS, store, "daid")
    whole = bytes_of(tmp_path)
    (tmp_path / "02_daid.png").unlink()
    (tmp_path / "provenance_03_daid.png").write_bytes(b"damaged")
    asked = []
    write = generation.write
    monkeypatch.setattr(generation, "write", lambda *words: asked.append(words[3]) or write(*words))
    draw(tmp_path, PROMPTS, store, "daid")
    assert [batch.numbers.tolist() for batch in asked] == [[2, 3]]
    assert bytes_of(tmp_path) == whole
    draw(tmp_path, PROMPTS, store, "daid")
    assert len(asked) == 1


@pytest.mark.slow
def test_a_picture_holds_how_it_was_made(store, tmp_path):
    draw(tmp_path, PROMPTS[:2], store, "daid")
    for number, prompt in enumerate(PROMPTS[:2]):
        with Image.open(tmp_path / f"{number:02d}_daid.png") as picture:
            text = picture.text
        assert (text["prompt"], text["seed"], text["method"]) == (prompt, str(number), "daid")
        assert (text["model"], text["store"]) == (MODEL, store)


def test_a_folder_that_another_process_draws_into_is_refused(tmp_path):
    with exclusive_lock(tmp_path), pytest.raises(UserError, match="another process is writing to"):
        draw(tmp_path, PROMPTS[:1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}'])
def test_a_foreign_record_is_left_alone(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json.*choose another --workdir"):
        draw(tmp_path, PROMPTS[:1])
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.slow
def test_a_record_never_has_other_files_removed(tmp_path):
    """Names come from a file that anybody may have written."""
    out, outside = tmp_path / "out", tmp_path / "x.png"
    draw(out, PROMPTS[:1])
    record = (out / "run.json").read_text()
    outside.write_bytes(b"mine")
    (out / "run.json").write_text(record.replace('"00_plain"', '"../x"'))
    draw(out, PROMPTS[1:2])
    assert outside.read_bytes() == b"mine"


@pytest.mark.slow
def test_records_are_not_written_through_a_link_that_leads_out(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    draw(out, PROMPTS[:1])
    whole = bytes_of(out)
    outside.mkdir()
    (out / ".parts").symlink_to(outside)
    with pytest.raises(UserError, match=r"\.parts is a link that leads out"):
        draw(out, PROMPTS[1:2])
    (out / ".parts").unlink()
    assert bytes_of(out) == whole and not list(outside.iterdir())
