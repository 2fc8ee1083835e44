"""From mappings to frozen dataclasses, strictly: an ml_collections config, or JSON that was written from one.

An unknown, missing or mistyped key is an error that names every such key at once.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from arrag_jax.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], config: Any, where: str = "config") -> T:
    """Reads a ConfigDict (or dict) into the frozen dataclass ``cls``.

    Args:
      cls: a dataclass; its fields may be numbers, strings, bools, tuples, Optionals and dataclasses.
      config: a mapping with exactly that class's fields.
      where: how error messages call this mapping ("config", "config.optimizer").

    Raises:
      UserError: naming every unknown, missing and mistyped key, with the nearest known key.
    """
    errors: list[str] = []
    value = _parse(cls, config, where, errors)
    if errors:
        raise UserError("; ".join(errors))
    return value


def _parse(cls: type, config: Any, where: str, errors: list[str]) -> Any:
    if not hasattr(config, "items"):
        errors.append(f"{where} must hold keys, not {config!r}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values, before = {}, len(errors)
    for key, value in config.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            errors.append(f"unknown key {where}.{key} ({hint})")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _parse(hints[key], value, f"{where}.{key}", errors)
        else:
            values[key] = _check(hints[key], value, f"{where}.{key}", errors)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key not in config and required:
            errors.append(f"missing key {where}.{key}")
    if len(errors) > before:
        return None
    try:
        return cls(**values)
    except UserError as error:
        errors.append(f"{where}: {error}")
        return None


def _check(hint: Any, value: Any, where: str, errors: list[str]) -> Any:
    """The value as the field's type takes it: int → float and list → tuple are the only conversions."""
    if hint is Any:  # a section that its owner parses later
        return value.to_dict() if hasattr(value, "to_dict") else value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        base = typing.get_origin(option) or option
        if base is float and type(value) is int:
            return float(value)
        if base is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if isinstance(value, base) and not (base is int and isinstance(value, bool)):
            return value
    errors.append(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return None
