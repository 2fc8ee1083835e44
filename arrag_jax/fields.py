"""Checks the fields of all settings: numbers must be finite and paths local; ``~`` in a path is expanded.

A frozen dataclass that derives from ``Settings`` is checked when an instance is created. A field of type ``LocalPath``
holds the path of a file or folder. ``ModelPath`` and ``DataPath`` may also hold an id of the Hugging Face hub, or an
address of object storage.
"""

import dataclasses
import functools
import operator
import os
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from arrag_jax import huggingface, object_storage
from arrag_jax.errors import UserError

LARGEST = 3.4028234e38  # the largest float32, the type of all computations
_PATH = "path"  # marks the fields that are paths
LocalPath = Annotated[str, _PATH]
ModelPath = Annotated[str, _PATH, huggingface.MODEL]
DataPath = Annotated[str, _PATH, huggingface.DATASET]
# An address may have no slashes after the colon ("hf:owner/name"). A local file with such a name is given as "./hf:…".
_ADDRESS = re.compile(
    r"(gs|gcs|s3|s3a|r2|az|abfss?|adl|wasbs?|hdfs|hf|huggingface|https?|ftps?|sftp|ssh|scp|file|dbfs|oci|oss):", re.I
)


class Settings:
    """Base class of the frozen dataclasses that hold settings.

    Fields of type int and float accept the number types of other libraries and convert them to Python's. The
    ``__post_init__`` of a subclass checks ranges. It runs after the numbers and paths have been converted, and does not
    need to call ``super().__post_init__()``.

    Raises:
      UserError: if a field has the wrong type of number, is not finite, or is not a valid local path.
    """

    def __post_init__(self):
        _convert(self)
        _require_finite(self)

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @functools.wraps(own)
        def __post_init__(self):
            _convert(self)
            own(self)  # runs before the finite check, because messages about ranges are clearer
            _require_finite(self)

        cls.__post_init__ = __post_init__  # type: ignore[method-assign]  # to wrap the class's own is what this is for


def local_path(path: str | os.PathLike, name: str, hub: str = "", storage: bool = False) -> str:
    """Returns a path on this machine, with ``~`` expanded.

    Args:
      name: name of the path in the message: a flag or a config key.
      hub: the kind of repository whose ids (``huggingface``) are accepted and returned as they are; "" = none.
        Where ids are accepted, so are addresses of object storage.
      storage: whether addresses of object storage are accepted where ids are not.

    Raises:
      UserError: if the path is another network address, has an unknown home folder, or is not a valid file name.
    """
    path = os.fspath(path)
    if hub and huggingface.is_id(path):
        return str(huggingface.parse_id(path, name, hub))
    if (hub or storage) and object_storage.is_address(path):
        return object_storage.canonical(path, name)
    if "://" in path or _ADDRESS.match(path):
        raise UserError(
            f"{name}={path} is an address; mount it, and give the folder, or copy it here ({_hub_forms(hub, storage)})"
        )
    if "\0" in path:
        raise UserError(f"{name}={path!r} holds a NUL character, which no path can; give another path")
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        raise UserError(f"{name}={path!r} is not UTF-8, which files are named in here; rename it") from None
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{name}={path}: no home folder is known for that; write the path in full, or as ./{path}")
    return expanded


def _hub_forms(hub: str, storage: bool) -> str:
    forms = [f"{huggingface.FORMS[hub]} for one of the Hugging Face hub"] if hub else []
    forms += [f"{object_storage.FORMS} for object storage"] if hub or storage else []
    return f"or write {', '.join(forms)}" if forms else "nothing is downloaded"


def is_path(hint: Any) -> bool:
    """Returns whether a field of this type holds a path."""
    return _PATH in getattr(hint, "__metadata__", ())


def hub_kind(hint: Any) -> str:
    """Returns the kind of repository whose ids a path of this type may be; "" = none."""
    return next((kind for kind in getattr(hint, "__metadata__", ()) if kind in huggingface.FORMS), "")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Returns the type of each field, including annotations such as ``LocalPath``."""
    return typing.get_type_hints(cls, include_extras=True)


def paths_in(config: Any, where: str = "config") -> Iterator[tuple[str, str]]:
    """Yields the name, such as "config.retrieval.store", and the value of every path in settings that is not empty."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from paths_in(value, name)
        elif is_path(hints(config.__class__)[field.name]) and value:
            yield name, value


def pin(paths: Iterable[tuple[str, str]], values: dict[str, Any], config: Any) -> bool:
    """Replaces each id of the hub, in place, by one with its commit, so that the command's records name the commit.

    What a command continues in its --workdir keeps the commits that it began with; only images that --append adds are
    those of the newest commit.

    Args:
      paths: name and value of every path, as ``paths_in`` yields them; flags are named "--flag".
      values: flags by name; the value is a path or a list of paths.
      config: nested mapping with the config's keys; None = there is none.

    Returns:
      Whether the config has changed.

    Raises:
      UserError: as ``huggingface.snapshot``.
    """
    changed, ids = False, [(name, path) for name, path in paths if huggingface.is_id(path)]
    recorded = huggingface.recorded_in(Path(values["workdir"])) if ids and values.get("workdir") else []
    for name, path in ids:
        begun = () if values.get("append") and name == "config.source" else recorded
        pinned = huggingface.pinned(path, name, begun)
        flag = name.removeprefix("--")
        if flag != name:
            old = values[flag]
            values[flag] = [pinned if x == path else x for x in old] if isinstance(old, list) else pinned
            continue
        *sections, key = name.split(".")[1:]
        place: Any = functools.reduce(lambda section, each: section[each], sections, config)
        changed = changed or place[key] != pinned
        place[key] = pinned
    return changed


def _convert(settings: Any) -> None:
    """Replaces numbers by Python's numbers and paths by expanded paths, in place."""
    for field in dataclasses.fields(settings):
        hint, value = hints(settings.__class__)[field.name], getattr(settings, field.name)
        kinds = typing.get_args(hint) if not is_path(hint) and typing.get_args(hint) else (hint,)
        if is_path(hint):
            value = local_path(value, field.name, hub_kind(hint))
        elif value is None and type(None) in kinds:
            continue
        elif float in kinds and typing.get_origin(hint) is tuple:
            value = tuple(_number(field.name, number, float) for number in value)
        elif float in kinds:
            value = _number(field.name, value, float)
        elif int in kinds and typing.get_origin(hint) is not tuple:
            value = _number(field.name, value, operator.index)
        else:
            continue
        object.__setattr__(settings, field.name, value)


def _number(name: str, value: Any, convert: Any) -> int | float:
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = "one number" if convert is float else "one whole number"
        raise UserError(f"{name}={value!r} must be {kind}") from error


def _require_finite(settings: Any) -> None:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not abs(number) <= LARGEST:
                raise UserError(f"{field.name}={value} must be a finite number, at most {LARGEST:.3g}")
