"""Reads what lies elsewhere: repositories of the Hugging Face hub by id, and object storage by address.

Every place that takes one takes the other, through these functions.
"""

import os
from collections.abc import Collection

from arrag_jax import huggingface, object_storage
from arrag_jax.errors import UserError

Snapshot = huggingface.Snapshot | object_storage.Snapshot


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is an id of the hub or an address of object storage."""
    return huggingface.is_id(path) or object_storage.is_address(path)


def snapshot(text: str | os.PathLike, name: str, kind: str) -> Snapshot:
    """Returns what an id or an address names, and the names of its files; nothing is copied.

    Args:
      name: name of the setting, for the message.
      kind: kind of the repository that an id must name.

    Raises:
      UserError: as ``huggingface.snapshot`` and ``object_storage.snapshot``.
    """
    if object_storage.is_address(text):
        return object_storage.snapshot(text, name)
    return huggingface.snapshot(huggingface.parse_id(os.fspath(text), name, kind))


def fetch(found: Snapshot, names: Collection[str]) -> None:
    """Copies those of the named files here that are not here yet.

    Raises:
      UserError: as ``huggingface.fetch`` and ``object_storage.fetch``.
    """
    if isinstance(found, object_storage.Snapshot):
        object_storage.fetch(found, names)
    else:
        huggingface.fetch(found, names)


def local_copy(path: str | os.PathLike, required: str) -> str | os.PathLike:
    """Returns a path as it is, unless it is a data set's id or an address: then the folder with a copy of all files.

    Args:
      required: name of a file that must be among them.

    Raises:
      UserError: as in ``snapshot`` and ``fetch``, or if there is no such file.
    """
    if not is_remote(path):
        return path
    found = snapshot(path, "store", huggingface.DATASET)
    names = found.below()
    if required not in names:
        part = "the address of its folder" if object_storage.is_address(path) else "its folder after a colon"
        raise UserError(f"{found.id} holds no {required}; give the id of what was uploaded, and {part}")
    fetch(found, [name for below, name in names.items() if below not in huggingface.BESIDE])
    return found.folder
