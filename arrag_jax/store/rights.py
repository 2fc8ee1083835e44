"""The licence and the source of stored images: recorded in the store, and read by searches, pages and drawn images.

``rights.jsonl`` in the store's folder has one line per image whose rights are known: {"image": name, "licence": …,
"source": …}. It is recorded from such a file, or from the .json files beside the images of a folder.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arrag_jax.data.stated_rights import UNSTATED, Rights, agreed, rights_of
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write, exclusive_lock
from arrag_jax.json_files import parse_json, read_json
from arrag_jax.parsing import shown

RIGHTS = "rights.jsonl"
UNKNOWN = "unknown"


def rights_in(directory: Path) -> dict[str, Rights]:
    """Returns the recorded rights of a store's images, by name.

    Raises:
      UserError: if the file is damaged.
    """
    path = directory / RIGHTS
    return dict(_lines(path)) if path.exists() else {}


def _lines(path: Path) -> Iterator[tuple[str, Rights]]:
    """Yields the name and rights on each line of a file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = parse_json(line, f"{path}, line {number},")
                    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
                        raise UserError(f'{path}, line {number}: it must name an image: {{"image": …, "licence": …}}')
                    yield record["image"], rights_of(record)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _beside(folder: Path, names: list[str]) -> Iterator[tuple[str, Rights]]:
    """Yields the rights that stand in the .json files beside the images of a folder."""
    for name in names:
        path = (folder / name).with_suffix(".json")
        if path.is_file() and isinstance(record := read_json(path), dict) and any(found := rights_of(record)):
            yield name, found


def record(directory: Path, names: list[str], given: Path) -> dict[str, Rights]:
    """Records rights of a store's images, in addition to those known, and returns all of them.

    Args:
      names: the names of all images of the store.
      given: a file of lines as in ``rights.jsonl``, or the folder of the images.

    Raises:
      UserError: if nothing is found, if the file names images that the store does not hold, or if another process
        writes to the store.
    """
    found = dict(_beside(given, names) if given.is_dir() else _lines(given))
    unknown = sorted(found.keys() - set(names))
    if unknown:
        raise UserError(f"the datastore holds no image {shown(unknown[0])} of {given} (and {len(unknown) - 1} others)")
    if not found:
        raise UserError(f"{given} states no licence or source of an image of the datastore")
    with exclusive_lock(directory):
        rights = rights_in(directory) | found
        write(directory, rights)
    return rights


def write(directory: Path, rights: Mapping[str, Rights]) -> None:
    """Writes the rights of images, in the order of their names."""
    with atomic_write(directory / RIGHTS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for name in sorted(rights):
            file.write(json.dumps({"image": name, **rights[name]._asdict()}) + "\n")


def carried(stores: Sequence[Any], names: Iterable[str]) -> dict[str, Rights]:
    """Returns the rights to record in a merged store: of its images whose rights were recorded in one of the stores.

    An image that several stores hold under one name, with different rights, has none.

    Args:
      stores: the stores that were merged.
      names: the images of the merged store.
    """
    recorded = {name for store in stores for name in rights_in(store.directory)} & set(names)
    pairs = ((name, store.rights.get(name, UNSTATED)) for store in stores for name in recorded & set(store.sources))
    return dict.fromkeys(recorded, UNSTATED) | agreed(pairs)


def require_licences(directory: Path, licences: tuple[str, ...], rights: Mapping[str, Rights]) -> None:
    """Raises UserError unless some image has one of the licences."""
    held = sorted({each.licence or UNKNOWN for each in rights.values()})
    if not set(licences) & set(held):
        known = f"those recorded are {', '.join(held)}" if held else "none are recorded; give build_datastore --rights"
        raise UserError(f"datastore {directory} has no image with licence {', '.join(licences)}: {known}")
