"""An export's card: what the hub's own reader finds at its head, and that a shared export is a model by id."""

import pytest

from arrag_jax.models.card import CARD, UNKNOWN, licence_of
from arrag_jax.models.checkpoint import load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.training.shared import write_manifest
from helpers import hub_server, tiny
from helpers.folders import contents


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.served() as hub:
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def test_a_card_says_what_the_hub_asks_for(hub, tmp_path):
    from huggingface_hub import metadata_load

    model = tiny.janus(parts=VISION)
    save_model(model, tmp_path / "base")
    base = contents(tmp_path / "base") | {CARD: b"---\nlicense: 'mit'\ntags: [x]\n---\n# Base\nlicense: other\n"}
    sha = hub.push("owner/base", base)
    config = {
        "task": "prior",
        "options": {"tokenizer": f"hf:owner/base@{sha}"},
        "data": {"source": "hf:datasets/owner/set@main:train"},
        "init_from": "",
    }
    save_model(model, tmp_path / "export")
    run = {"command": 'python x --config.a="b:\n c"', "step": 7, "config": config}
    write_manifest(tmp_path / "export", model, run, psnr_db=31.5, codes_used=1.0)
    assert metadata_load(tmp_path / "export" / CARD) == {
        "library_name": "arrag_jax",
        "license": "mit",
        "base_model": ["owner/base"],
        "datasets": ["owner/set"],
        "metrics": ["codes_used", "psnr_db"],
        "pipeline_tag": "text-to-image",
    }
    text = (tmp_path / "export" / CARD).read_text()
    assert f"started from: hf:owner/base@{sha}" in text and "| psnr_db | 31.5 |" in text
    hub.push("owner/mine", contents(tmp_path / "export"))
    assert load_tokenizer("hf:owner/mine").fingerprint == model.fingerprint
    assert licence_of({"base": "hf:owner/mine"}) == "mit"  # what is tuned from it has its licence


def test_a_licence_that_is_not_known_is_not_made_up(hub, tmp_path):
    model = tiny.janus(parts=VISION)
    save_model(model, tmp_path / "export")
    write_manifest(tmp_path / "export", model, {"config": {"task": "tokenizer"}}, psnr_db=1.0)
    text = (tmp_path / "export" / CARD).read_text()
    assert 'license: "unknown"' in text and "The licence is not known. Name it" in text and "pipeline" not in text
    (tmp_path / "export" / CARD).write_text("---\nlicense: mit\n---\n")
    two = {"base": str(tmp_path / "export"), "options": {"tokenizer": "hf:owner/none"}}
    assert licence_of({"base": two["base"]}) == "mit"
    assert licence_of(two) == UNKNOWN
