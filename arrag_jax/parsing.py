"""Parses mappings into frozen dataclasses: an ml_collections config, or JSON that was written from one.

A dataclass is the schema of a file: ``parse`` checks the types of its fields, and its ``__post_init__`` checks their
ranges. One error names all keys that are unknown, missing or of the wrong type.
"""

import dataclasses
import difflib
import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arrag_jax.errors import UserError

T = TypeVar("T")
MOST_ERRORS = 20  # errors that one message lists
MOST_DIFFERENCES = 8  # differences that one message lists
LONGEST = 1000  # characters of one error
LARGEST = 2**63  # integers must be smaller, because numpy and the file formats hold 64 bits
PACKAGE = Path(__file__).parent
# The shipped config files are inside the installed package; in a checkout they are beside the package.
CONFIGS = next((path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()), PACKAGE)


def config_file(given: str) -> str:
    """Returns the path of a config file: the given path, or a shipped config file if no file has that path.

    "NAME" and "configs/NAME.py" are names of the shipped file NAME.py, from any working directory.

    Raises:
      UserError: if there is neither such a file nor a shipped config of that name.
    """
    shipped = {name: str(path) for path in CONFIGS.glob("*.py") for name in (path.stem, f"configs/{path.name}")}
    if os.path.isfile(given) or not (given in shipped or not os.path.lexists(given)):
        return given
    if given not in shipped:
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
        raise UserError(f"config file {given} does not exist; give a path, or one of the shipped: {names}")
    return shipped[given]


def parse(cls: type[T], config: Any, where: str = "config", ignore_unknown: bool = False) -> T:
    """Reads a ConfigDict (or dict) into the frozen dataclass ``cls``.

    Args:
      cls: a dataclass; its fields may be numbers, strings, bools, tuples, dicts by string, Optionals and dataclasses.
      config: a mapping with exactly that class's fields.
      where: name of this mapping in messages, such as "config" or "config.optimizer".
      ignore_unknown: ignore keys that are not fields; for files of other programs, which hold more keys.

    Raises:
      UserError: if keys are unknown, missing or of the wrong type; the message names them and the nearest known keys.
    """
    errors: list[str] = []
    value = _parse(cls, config, where, errors, ignore_unknown)
    if errors:
        more = f"; and {len(errors) - MOST_ERRORS} more" if len(errors) > MOST_ERRORS else ""
        raise UserError("; ".join(map(_cut, errors[:MOST_ERRORS])) + more)
    return value


def repeated(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns a command line in which "--name a b" is written "--name=a --name=b", for these names of flags."""
    words, name = [], ""
    for word in argv:
        own = word in [f"{dashes}{each}" for dashes in ("-", "--") for each in names]
        name = word if own else "" if word.startswith("-") else name
        words += [] if own else [f"{name}={word}" if name else word]
    return words


def in_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Raises UserError unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise UserError(f"{name}={value} is outside [{low:g}, {high:g}]")


def _cut(message: str) -> str:
    """Returns a message, shortened if it is long; dataclasses put values of any length into their messages."""
    return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"


def shown(value: Any) -> str:
    """Returns a value as text for a message: one line, shortened if it is long."""
    return _Shown().repr(value)


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Returns the first keys in which two mappings differ, as "key (1 there, 2 now), …"; "" if they are equal."""
    keys = [key for key in sorted(held.keys() | wanted.keys()) if held.get(key) != wanted.get(key)]
    words = [f"{key} ({shown(held.get(key))} there, {shown(wanted.get(key))} now)" for key in keys[:MOST_DIFFERENCES]]
    return ", ".join(words if len(keys) <= MOST_DIFFERENCES else [*words, "…"])


class _Shown(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel = 3


# Keys that earlier versions had: (dataclass, old key) → text that says what to write instead.
RENAMED = {
    ("DaidConfig", "copies"): 'reduction, with "max" for "nearest"',
    ("DataConfig", "name"): "source",
    ("DataSetConfig", "name"): "source",
}


def _parse(cls: type, config: Any, where: str, errors: list[str], ignore_unknown: bool) -> Any:
    if not hasattr(config, "items"):
        errors.append(f"{where} must hold keys, not {shown(config)}")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values, before = {}, len(errors)
    for key, value in config.items():
        if key in fields:
            values[key] = _check(hints[key], value, f"{where}.{key}", errors, ignore_unknown)
        elif not ignore_unknown:
            name = key if len(key) <= 80 and key.isprintable() else shown(key)
            near = difflib.get_close_matches(key[:80], fields, 1) if len(errors) < MOST_ERRORS else []
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            new = RENAMED.get((cls.__name__, name))
            errors.append(f"unknown key {where}.{name} ({f'it is called {new} now' if new else hint})")
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


def _check(hint: Any, value: Any, where: str, errors: list[str], ignore_unknown: bool) -> Any:
    """Returns the value in the field's type; the only conversions are int → float and list → tuple."""
    if hint is Any:  # another module parses this section later
        return value.to_dict() if hasattr(value, "to_dict") else value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        base = typing.get_origin(option) or option
        if isinstance(base, type) and dataclasses.is_dataclass(base) and (hasattr(value, "items") or len(options) == 1):
            return _parse(base, value, where, errors, ignore_unknown)
        if base is dict and hasattr(value, "items"):
            inner = (*typing.get_args(option), Any, Any)[1]
            return {key: _check(inner, x, f"{where}.{shown(key)}", errors, ignore_unknown) for key, x in value.items()}
        if base is tuple and isinstance(value, list | tuple):
            return _tuple(option, tuple(value), where, errors, ignore_unknown)
        if base in (int, float) and type(value) in (int, base):
            return _number(base, value, where, errors)
        if base not in (int, float, dict, tuple) and isinstance(value, base):
            return value
    errors.append(f"{where} must be {getattr(hint, '__name__', hint)}, got {shown(value)}")
    return None


def _number(base: type, value: int | float, where: str, errors: list[str]) -> Any:
    """Returns a number as ``base``, if it is finite and fits into 64 bits; otherwise appends an error."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        errors.append(f"{where}={shown(value)} is too large")
        return None
    if not math.isfinite(value):
        errors.append(f"{where} must be a finite number, got {value}")
        return None
    return base(value)


def _tuple(hint: Any, value: tuple, where: str, errors: list[str], ignore_unknown: bool) -> tuple | None:
    """Returns a tuple with elements of the declared types and number; otherwise appends an error."""
    inner = typing.get_args(hint)
    if not inner:
        return value
    if inner[-1] is ...:
        inner = inner[:1] * len(value)
    if len(inner) != len(value):
        errors.append(f"{where} must hold {len(inner)} values, got {shown(value)}")
        return None
    before, found = len(errors), []
    for i, (kind, x) in enumerate(zip(inner, value, strict=True)):
        found.append(_check(kind, x, f"{where}[{i}]", errors, ignore_unknown))
        if len(errors) > before:
            return None
    return tuple(found)
