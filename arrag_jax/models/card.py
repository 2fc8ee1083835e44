"""The model card of an export: README.md with the head that the Hugging Face hub reads."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arrag_jax import huggingface, remote
from arrag_jax.errors import UserError, printable
from arrag_jax.files import atomic_write
from arrag_jax.models.place import checkpoint_folder

CARD = "README.md"
UNKNOWN = "unknown"  # the hub's own word for a licence that is not known
BASES = ("base", "tokenizer", "init_from")  # keys of a config that name the models that a run started from
_LICENSE = re.compile(r"^license: *[\"']?([\w.-]+)[\"']? *$", re.MULTILINE)


def write_card(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes the card of an export.

    Args:
      directory: the export's folder.
      content: what its manifest records: figures, and the run's command and config.
    """
    config = content.get("config", {})
    ids = [huggingface.parse_id(text, CARD) for _, text in _texts(config) if huggingface.is_id(text)]
    data = config.get("data", {}).get("source", "") if isinstance(config.get("data"), Mapping) else ""
    head: dict[str, Any] = {
        "library_name": "arrag_jax",
        "license": licence_of(config),
        "base_model": sorted({x.repo for x in ids if x.kind == huggingface.MODEL}),
        "datasets": sorted({x.repo for x in ids if x.kind == huggingface.DATASET}),
        "metrics": sorted(content.get("figures", {})),
    }
    if config.get("task") != "tokenizer":
        head["pipeline_tag"] = "text-to-image"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value), "---", ""]
    lines += [f"# {config.get('task', 'model')}, trained with arrag_jax", ""]
    lines += [f"- started from: {text}" for key, text in _texts(config) if key in BASES and text]
    lines += [f"- images: {data}" for _ in [data] if data]
    lines += [f"- {name}: {content[name]}" for name in ("step", "training_minutes", "command") if name in content]
    lines += ["", "| held out | |", "| --- | ---: |"]
    lines += [f"| {name} | {value:g} |" for name, value in content.get("figures", {}).items()]
    if head["license"] == UNKNOWN:
        lines += ["", "The licence is not known. Name it at the head of this file before you share these weights."]
    lines += ["", "`manifest.json` holds the whole config and the hashes of the files.", ""]
    with atomic_write(directory / CARD) as temporary:
        temporary.write_text("\n".join(map(printable, lines)), encoding="utf-8")


def licence_of(config: Mapping[str, Any]) -> str:
    """Returns the licence that all models agree on that a run started from, by their cards; else "unknown"."""
    found = {_licence_in(text) for key, text in _texts(config) if key in BASES and text}
    return found.pop() if len(found) == 1 else UNKNOWN


def _licence_in(model: str) -> str:
    """Returns the licence at the head of the card of a model; "unknown" if it names none, or cannot be read."""
    try:
        folder = checkpoint_folder(Path(model))
        if remote.is_remote(model):
            found = remote.snapshot(model, CARD, huggingface.MODEL)
            remote.fetch(found, [name for below, name in found.below().items() if below == CARD])
        head = (folder / CARD).read_text(encoding="utf-8").split("---")[1]
    except (UserError, OSError, UnicodeError, IndexError):
        return UNKNOWN
    named = _LICENSE.search(head)
    return named[1] if named else UNKNOWN


def _texts(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the key and the value of every text in a config."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _texts(value, key)
    elif isinstance(config, str):
        yield name, config
