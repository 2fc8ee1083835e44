"""Forgets images of a store: their names stand in a file that every search obeys at once, until a purge.

``forgotten.json`` in the store's folder holds the names, as the files of sources spell them. Rows keep their numbers,
and saved indexes stay valid, because a search leaves out the patches of these images (``retrieval.patches``). A purge
writes the store again without them, to the bytes of a store that was built without them.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_folder, exclusive_lock, folder_in, is_followed, write_json
from arrag_jax.json_files import read_object
from arrag_jax.ops.keys import KINDS_BY_FILE
from arrag_jax.parsing import shown
from arrag_jax.store.building import manifest_of
from arrag_jax.store.datastore import CODEBOOK, Datastore
from arrag_jax.store.hidden import HiddenFolder, backbones_in, folder_of
from arrag_jax.store.hidden_building import copy_hidden
from arrag_jax.store.rights import rights_in, write
from arrag_jax.store.shards import MANIFEST, content_of, write_manifest
from arrag_jax.store.shown import FORGOTTEN
from arrag_jax.store.writer import write_file

FEW = 5  # unknown names that a message lists


def forget(directory: Path, names: Collection[str]) -> Datastore:
    """Hides the images with these names from every search, and returns the store.

    Raises:
      UserError: if the store holds no image of a name (then nothing is forgotten), if it would hold none any more, or
        if another process writes to it.
    """
    with exclusive_lock(directory):
        store = Datastore.open(directory)
        store.require_manifest()
        held = set(store.sources)
        unknown = sorted(set(names) - held)
        if unknown:
            more = f" and {len(unknown) - FEW} more" if len(unknown) > FEW else ""
            raise UserError(
                f"datastore {directory} holds no image {', '.join(map(shown, unknown[:FEW]))}{more}; nothing was "
                "forgotten. Names are spelt as in sources-*.txt"
            )
        forgotten = store.forgotten | set(names)
        if forgotten >= held:
            raise UserError(f"datastore {directory} would hold no image any more; delete the folder instead")
        write_json(directory / FORGOTTEN, {"names": sorted(forgotten)})
    return Datastore.open(directory)


def purge(directory: Path) -> Datastore:
    """Writes the store again without the forgotten images, and returns it; its indexes are to be built again.

    Raises:
      UserError: if nothing is forgotten, if the store lists images that could not be read or were duplicates (then
        numbers of images would change their shards), or if another process writes to it.
    """
    if is_followed():
        raise UserError(
            f"--purge replaces a datastore as a whole, which cannot be done at an address; copy it without the "
            f"forgotten images: python -m arrag_jax.build_datastore --merge={directory} --workdir=NEW"
        )
    with exclusive_lock(directory):
        store = Datastore.open(directory)
        store.verify()
        if not store.forgotten:
            raise UserError(f"nothing is forgotten in datastore {directory}, so there is nothing to purge")
        if store.num_bad or store.num_duplicates:
            raise UserError(
                f"datastore {directory} lists images that were left out, so it cannot be purged in place; copy it "
                f"without the forgotten ones: python -m arrag_jax.build_datastore --merge={directory} --workdir=NEW"
            )
        with atomic_folder(directory, "a datastore", replace=True) as temporary:
            _write(store, temporary)
    return Datastore.open(directory)


def _write(store: Datastore, target: Path) -> None:
    """Writes the images of a store that are not forgotten, segment by segment, into an empty folder."""
    kept, parts, first = np.asarray(store.shown), {}, 0
    segments = [(each, np.flatnonzero(kept[first : (first := first + each.num_images)])) for each in store.wholes]
    segments = [(each, numbers) for each, numbers in segments if len(numbers)]
    for number, (each, numbers) in enumerate(progress.bar(segments, unit="segment", desc=str(store.directory))):
        folder = folder_in(target, f"part-{number:05d}") if number else target
        folder.mkdir(exist_ok=True)
        settings = dataclasses.replace(each.settings, num_images=len(numbers))
        (folder / CODEBOOK).write_bytes((each.directory / CODEBOOK).read_bytes())
        for shard in range(settings.num_shards):
            part = settings.shard_images(shard)
            images = numbers[part.start : part.stop]
            for kind, name in settings.shard_files(shard).items():
                whole = each.records(kind) if kind in KINDS_BY_FILE else getattr(each, kind)
                items = [whole[i].tobytes() if kind in KINDS_BY_FILE else whole[i] for i in images.tolist()]
                write_file(folder / name, kind, items)
        write_manifest(folder, manifest_of(Datastore, folder, settings))
        for backbone in backbones_in(each.directory):
            held = HiddenFolder.open(folder_of(each.directory, backbone))
            copy_hidden(held, numbers, folder_of(folder, backbone), Datastore.open(folder).store_fingerprint)
        if number:
            parts[folder.name] = Datastore.open(folder).store_fingerprint
    if rights := {name: each for name, each in rights_in(store.directory).items() if name not in store.forgotten}:
        write(target, rights)
    if parts:
        content = content_of(read_object(target / MANIFEST))
        write_manifest(target, {**content, "parts": parts})
