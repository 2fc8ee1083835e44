"""Stores of several parts: images added to a whole store, and stores merged into one.

A part is a store of its own in a folder ``part-00001`` of the first one, whose manifest names it with its fingerprint.
Nothing that is whole is ever written again but that manifest, which is replaced in one step.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arrag_jax.errors import UserError
from arrag_jax.files import folder_in, only_writer, require_within, whole_file, write_json
from arrag_jax.retrieval.building import state_of
from arrag_jax.retrieval.datastore import Datastore, StoreSettings
from arrag_jax.retrieval.shards import MANIFEST, write_manifest

MERGING = ".merging.json"  # in the folder of an unfinished merge: the fingerprints of what is merged
SAME_IN_ALL_PARTS = ("fingerprint", "grid", "codebook_size", "code_dim", "keys", "captions")


def next_part(store: Datastore) -> Path:
    """Folder of the first part that the store does not hold yet; perhaps begun or whole already."""
    return require_within(store.directory, store.directory / _part_name(len(store.parts) + 1))


def require_fits(store: Datastore, settings: StoreSettings, other: Datastore | None = None) -> None:
    """Raises UserError unless images of these settings can be a part of the store.

    Args:
      other: the store that has these settings, where it is there already.
    """
    for name in SAME_IN_ALL_PARTS:
        ours, theirs = getattr(store.settings, name), getattr(settings, name)
        if ours != theirs and not (name == "keys" and set(ours) == set(theirs)):
            mend = _mend(name, (store, ours), (other, theirs))
            raise UserError(
                f"datastore {store.directory} has {name}={ours!r}, what is added {theirs!r}; keep the two apart{mend}"
            )


def _mend(name: str, *both: tuple[Datastore | None, Any]) -> str:
    """The words that follow on "keep the two apart" where a command makes them fit."""
    if name == "keys":
        union = tuple(dict.fromkeys(kind for _, held in both for kind in held))
        flag, lacking = f"--config.keys={','.join(union)}", [x for x, held in both if set(held) < set(union)]
    elif name == "captions":
        flag, lacking = "--config.captions=True", [x for x, held in both if not held]
    else:
        return ""
    commands = [store.further(flag) if store else f"this command again with {flag}" for store in lacking]
    return f", or first run: {' and '.join(commands)}"


def add_part(
    store: Datastore, part: Path, prepare: Callable[[Datastore], contextlib.AbstractContextManager] | None = None
) -> Datastore:
    """Adds a whole part to the store's manifest.

    Args:
      prepare: given the store as it will be, builds what belongs to it (its indexes) aside; left right after the
        manifest is written, it puts that in place. Readers have the old store with the old indexes until then.

    Raises:
      UserError: the part is not whole or does not fit, or another process writes to the store.
    """
    whole = Datastore.open(part)
    require_fits(store, whole.settings)
    content = {key: value for key, value in store.manifest.items() if key != "sha256"}
    content["parts"] = {**content.get("parts", {}), part.name: whole.fingerprint}
    grown = dataclasses.replace(
        store, manifest=content, parts=(*store.parts, whole), num_images=store.num_images + whole.num_images
    )
    with contextlib.ExitStack() as prepared:
        if prepare is not None:
            prepared.enter_context(prepare(grown))
        with only_writer(store.directory):
            if Datastore.open(store.directory).manifest != store.manifest:
                raise UserError(f"another process has changed {store.directory}; run the same command again")
            write_manifest(store.directory, content)
            prepared.close()
    return Datastore.open(store.directory)


def merge(stores: list[Datastore], directory: str | Path) -> Datastore:
    """Copies stores, one after another, into one in ``directory``; run again to continue.

    Raises:
      UserError: they differ in tokenizer, grid or kinds of key, or the directory holds something else.
    """
    directory = Path(directory)
    for store in stores:
        require_fits(stores[0], store.settings, store)
        if store.directory.resolve() == directory.resolve():
            raise UserError(f"--workdir={directory} is one of the stores to merge; choose another")
    merged = [store.fingerprint for store in stores]
    state, _ = state_of(Datastore, directory) if not (directory / MERGING).exists() else ("merging", None)
    directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory):
        if state == "whole":
            _require_same_merge(directory / MANIFEST, merged)
        elif state == "begun":
            raise UserError(f"{directory} holds an unfinished datastore; finish it, or choose another --workdir")
        elif state == "merging":
            _require_same_merge(directory / MERGING, merged)
        else:
            write_json(directory / MERGING, {"merged": merged})
        if state != "whole":
            _copy([part for store in stores for part in (store, *store.parts)], directory, merged)
        (directory / MERGING).unlink(missing_ok=True)
    return Datastore.open(directory)


def _require_same_merge(record: Path, merged: list[str]) -> None:
    if json.loads(record.read_text(encoding="utf-8")).get("merged") != merged:
        raise UserError(f"{record.parent} holds something else than these stores merged; choose another --workdir")


def _copy(parts: list[Datastore], directory: Path, merged: list[str]) -> None:
    """Copies every file that is not there yet, then writes the manifests, the first part's last."""
    contents: dict[Path, dict[str, Any]] = {}
    jobs = []
    for number, part in enumerate(parts):
        target = folder_in(directory, _part_name(number)) if number else directory
        contents[target] = {key: value for key, value in part.manifest.items() if key not in ("parts", "sha256")}
        jobs += [(part.directory / name, target / name) for name in part.files]
    for source, target in tqdm(jobs, unit="file", desc=str(directory), dynamic_ncols=True):
        if not target.exists():
            with whole_file(target) as temporary:
                temporary.write_bytes(source.read_bytes())
    names = {}
    for target, content in list(contents.items())[1:]:
        write_manifest(target, content)
        names[target.name] = Datastore.open(target).fingerprint
    write_manifest(directory, {**contents[directory], "parts": names, "merged": merged})


def _part_name(number: int) -> str:
    return f"part-{number:05d}"
