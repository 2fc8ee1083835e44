"""Finds and fetches the files of a data set of the Hugging Face hub: its Parquet files, tars or images of one split.

Which files belong to which split is what the hub itself goes by: the data files that the head of README.md names, else
the names of the files ("data/train-00000-of-00004.parquet", "test/0001.tar"). Files whose names tell nothing are
"train".
"""

import fnmatch
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from arrag_jax import huggingface
from arrag_jax.data import endings, parquet
from arrag_jax.data.endings import TAR
from arrag_jax.errors import UserError

CARD, TRAIN = "README.md", "train"
KINDS = (parquet.SUFFIX, TAR)  # the first kind that a data set has is read; a data set of neither has files of images
_NUMBERED = re.compile(r"(?:.*/)?([\w.]+)-\d{5}-of-\d{5}(-\w+)?\.\w+")
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def root_of_hub(source: str) -> Path:
    """Returns the folder of the hub's cache that the ids of a data set's images are relative to."""
    return _snapshot(source, "source").root


def commit_of(source: str) -> str:
    """Returns the commit that the source means."""
    return _snapshot(source, "source").id.revision


def names_split(source: str) -> bool:
    """Returns whether an id names a split."""
    return bool(huggingface.parse_id(source, "source", huggingface.DATASET).part)


def files_of(source: str, key: str = "config.source") -> tuple[Path, list[str]]:
    """Returns the folder of the cache and the names of the files of one split in it; downloads those that are absent.

    Args:
      source: an id; without a split, the split "train", or the only one.
      key: name of the setting, for error messages.

    Raises:
      UserError: if there is no such data set or split, or as in ``huggingface.fetch``.
    """
    found = _snapshot(source, key)
    if CARD in found.files:
        huggingface.fetch(found, [CARD])
    splits = splits_of(found.files, _head(found.root / CARD))
    if not splits:
        raise UserError(f"{key}={source} holds neither Parquet files, nor tars, nor images")
    split = found.id.part or (TRAIN if TRAIN in splits or len(splits) > 1 else next(iter(splits)))
    if split not in splits:
        raise UserError(
            f"{key}={source} has no split {split}; it has {', '.join(sorted(splits))}: write one after a colon"
        )
    huggingface.fetch(found, splits[split])
    return found.root, splits[split]


def splits_of(files: Iterable[str], head: dict[str, Any]) -> dict[str, list[str]]:
    """Returns split → names of its files, sorted.

    Args:
      files: all names in the repository.
      head: the values at the head of its README.md.
    """
    names = sorted(name for name in files if not any(part.startswith(".") for part in name.split("/")))
    kind = next((kind for kind in KINDS if any(name.lower().endswith(kind) for name in names)), "")
    if kind:
        names = [name for name in names if name.lower().endswith(kind)]
    elif not any(endings.is_image(name) for name in names):
        return {}
    declared = {
        split: [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        for split, patterns in _declared(head).items()
    }
    if any(declared.values()):
        return {split: found for split, found in declared.items() if found}
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_in(name), []).append(name)
    return splits


def _snapshot(source: str, key: str) -> huggingface.Snapshot:
    return huggingface.snapshot(huggingface.parse_id(source, key, huggingface.DATASET))


def _split_in(name: str) -> str:
    """Returns the split that a file's name tells."""
    if numbered := _NUMBERED.fullmatch(name):
        return numbered[1]
    for split, words in _WORDS.items():
        if re.search(rf"(^|[-._ 0-9/])({'|'.join(words)})([-._ 0-9/]|$)", name.lower()):
            return split
    return TRAIN


def _declared(head: dict[str, Any]) -> dict[str, Collection[str]]:
    """Returns split → patterns of the default configuration that the head of a README.md declares; {} if none."""
    configs = [x for x in head.get("configs") or [] if isinstance(x, dict)] if isinstance(head, dict) else []
    chosen = [x for x in configs if x.get("default") is True or x.get("config_name") == "default"] or configs
    files = chosen[0].get("data_files") if chosen else None
    if isinstance(files, str):
        files = [{"split": TRAIN, "path": files}]
    found: dict[str, Collection[str]] = {}
    for each in files if isinstance(files, list) else []:
        if isinstance(each, dict) and isinstance(each.get("split"), str):
            paths = each.get("path")
            found[each["split"]] = [paths] if isinstance(paths, str) else [x for x in paths or [] if isinstance(x, str)]
    return found


def _head(card: Path) -> dict[str, Any]:
    """Returns the values at the head of a README.md; {} if it has none, or they cannot be read."""
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception:  # the parser of YAML raises several types; without a head, the names of the files tell
        return {}
