"""Writes the part of ``--help`` that lists every key of a command's config, with its meaning and its default.

The meaning of a key is read from the source: from the comment of its field, or from "Attributes:" in the docstring of
its dataclass.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from arrag_jax.fields import hints, hub_kind, is_path

WIDTH = 100
Sections = Mapping[str, tuple[str, Mapping[str, type]]]  # free section → (key that chooses, choice → dataclass)


def keys_text(config_class: type, sections: Sections) -> str:
    """Returns the part of the help that describes the config's keys.

    Args:
      config_class: the config's dataclass.
      sections: the dataclasses of the free sections, as in ``command.main_with_config``.
    """
    lines = ["", "config keys, in the file that --config names or as --config.KEY=VALUE:", ""]
    lines += _keys(config_class, "config")
    for section, (key, choices) in sections.items():
        for choice, cls in choices.items():
            lines += ["", f"config.{section} where config.{key} is {choice!r}:", "", *_keys(cls, f"config.{section}")]
    return "\n".join(lines)


def meanings(cls: type) -> dict[str, str]:
    """Returns the meaning of each field of a dataclass, by field name; fields without a description are left out."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        if dataclasses.is_dataclass(ancestor):
            found |= _attributes(inspect.getdoc(ancestor) or "") | _comments(ancestor)
    return found


def _keys(cls: type, prefix: str) -> Iterator[str]:
    """Yields lines that describe the keys of a dataclass and of its sections."""
    said = meanings(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints(cls)[field.name], f"{prefix}.{field.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _keys(hint, name)
            continue
        default = "required" if _required(field) else f"default {_default(field)!r}"
        yield f"  {name} ({_type_name(hint)}, {default})"
        yield from textwrap.wrap(said.get(field.name, ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    make: Any = field.default_factory
    return field.default if field.default is not dataclasses.MISSING else make()


def _type_name(hint: Any) -> str:
    if is_path(hint):
        return "path, hub id or address" if hub_kind(hint) else "path"
    if hint is Any:
        return "section"
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


def _attributes(doc: str) -> dict[str, str]:
    """Returns the texts under "Attributes:" in a docstring, by name; "a, b: text" gives both names that text."""
    _, _, part = doc.partition("Attributes")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in part.partition("\n")[2].splitlines():
        if not line.startswith("  "):
            if line.strip():
                break
            continue
        head = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field: the comment lines before it, then the comments on its own lines."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # the package is installed without its source
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found, lines = {}, source.splitlines()
    for name, first, last in _class_body(source):
        before = first - 1
        while before in comments and lines[before - 1].lstrip().startswith("#"):
            before -= 1
        said = [comments[line] for line in range(before + 1, last + 1) if line in comments]
        if said:
            found[name] = " ".join(said)
    return found


def _class_body(source: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name, first line and last line of every annotated field of the class that a source defines."""
    defined = ast.parse(source).body[0]
    assert isinstance(defined, ast.ClassDef)
    for node in defined.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno, node.end_lineno or node.lineno
