"""``run.json``: what the images of a folder were made with, so that a folder never mixes two runs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arrag_jax.decode.methods import METHODS, Kind
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.files import sha256_of, write_json
from arrag_jax.json_files import read_json
from arrag_jax.models.checkpoint import files_of
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.retrieval.index import RECORD as INDEX_RECORD
from arrag_jax.retrieval.index import index_directory

RECORD = "run.json"
VERSION = 1


def method_facts(pipeline: Pipeline, method: str) -> dict[str, Any]:
    """Returns the model, store and settings that a method uses, with their hashes."""
    policy: Any = pipeline.policy(method)
    folder, config = pipeline.folders[method], pipeline.config
    facts: dict[str, Any] = {"model": folder, "model_sha256": _sha256_of_model(folder)}
    if METHODS[method].model is Kind.FAID_HIDDEN:  # the base's states find the neighbours
        facts |= {"base": config.model, "base_sha256": _sha256_of_model(config.model)}
    if config.int8:  # absent otherwise, as in older records
        facts["int8"] = True
    if not policy.uses_retrieval:
        return facts
    opened, chosen = pipeline.search_of(method), METHODS[method]
    facts |= {"store": opened.config.store, "store_fingerprint": opened.store.shown_fingerprint}
    index = index_directory(opened.store, opened.config.keys) / INDEX_RECORD
    if opened.config.search in ("scann", "ray") and not chosen.limited and index.exists():
        facts["index"] = sha256_of(index)
    if chosen.images:
        facts["caption"] = {"images": chosen.images(config)}
    if chosen.gate:
        facts["gate"] = dataclasses.asdict(chosen.gate(config))
    if (chosen.images or chosen.gate) and config.caption.nearness == "sentences":
        facts["sentence_model"] = config.caption.sentence_model
    if opened.config.keys == HIDDEN.name:
        facts["copy_share"] = config.hidden.copy_share
    retrieval = dataclasses.asdict(opened.config)
    del retrieval["ray"]  # on which machines the store is changes no image
    return facts | {"retrieval": retrieval, "policy": dataclasses.asdict(policy)}


def _sha256_of_model(folder: str) -> str:
    """Returns the hash of a model folder's config, weights and text tokenizer."""
    digest = hashlib.sha256()
    for path in files_of(folder):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def texts_of(prompt: str, seed: int, method: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the PNG text chunks of an image: prompt, seed, method, and model and store with their hashes.

    ``int8`` is among them if the model's weights are held so.
    """
    names = ("model", "model_sha256", "store", "store_fingerprint", "index")
    return {
        "prompt": prompt,
        "seed": str(seed),
        "method": method,
        **{name: facts.get(name, "none") for name in names},
        **({"int8": "true"} if facts.get("int8") else {}),
    }


class RunRecord:
    """The record of one run in a folder.

    Attributes:
      path: of ``run.json``.
      settings: settings of this run, in the form that JSON gives back.
    """

    def __init__(self, directory: Path, made_by: str, settings: Mapping[str, Any]):
        self.path, self._made_by = directory / RECORD, made_by
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists

    def read(self) -> dict[str, Any] | None:
        """Returns the record in the folder; None if there is none.

        Raises:
          UserError: if it is damaged, or another command wrote it.
        """
        if not self.path.exists():
            return None
        mend = "delete it to draw anew, or choose another --workdir"
        try:
            record = read_json(self.path)
        except UserError as error:
            raise UserError(f"{error}; {mend}") from None
        if not (
            isinstance(record, dict)
            and record.get("made_by") == self._made_by
            and record.get("version") == VERSION
            and isinstance(record.get("settings"), dict)
        ):
            raise UserError(f"{self.path} is not a record of {self._made_by} that this code reads; {mend}")
        return record

    def differing(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the names of the settings in which the run of a record differs from this one."""
        keys = {**record["settings"], **self.settings}
        return tuple(key for key in keys if record["settings"].get(key) != self.settings.get(key))

    def write(self, **more: Any) -> None:
        """Writes the record, with further keys."""
        write_json(self.path, {"made_by": self._made_by, "version": VERSION, "settings": self.settings, **more})
