"""The text of ``--help``: what a command's module says, its flags, and every key of its config with its default.

What a key means stands beside its field, in a comment or under "Attributes:" in the docstring of its dataclass.
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

from arrag_jax.fields import hints, is_path

WIDTH = 100
Sections = Mapping[str, tuple[str, Mapping[str, type]]]  # free section → key that chooses, choice → its dataclass


def keys_text(config_class: type, sections: Sections) -> str:
    """Returns the part about the config's keys.

    Args:
      config_class: the config's dataclass.
      sections: the free sections' own dataclasses, as ``command.main_with_config`` has them.
    """
    lines = ["", "config keys, in the file that --config names or as --config.KEY=VALUE:", ""]
    lines += _keys(config_class, "config")
    for section, (key, choices) in sections.items():
        for choice, cls in choices.items():
            lines += ["", f"config.{section} where config.{key} is {choice!r}:", "", *_keys(cls, f"config.{section}")]
    return "\n".join(lines)


def meanings(cls: type) -> dict[str, str]:
    """Returns what each field of a dataclass means, by its name; fields of which nothing is said are left out."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        if dataclasses.is_dataclass(ancestor):
            found |= _attributes(inspect.getdoc(ancestor) or "") | _comments(ancestor)
    return found


def _keys(cls: type, prefix: str) -> Iterator[str]:
    """Lines about the keys of a dataclass and of the sections in it."""
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
        return "path"
    if hint is Any:
        return "section"
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


def _attributes(doc: str) -> dict[str, str]:
    """Names and texts under "Attributes:" in a docstring; "a, b: text" is said of both."""
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
    """What comments say of the fields: those on a field's own lines, after those on the lines before it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # installed without its source
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
    """Name, first and last line of every annotated name in the body of the class that a source defines."""
    defined = ast.parse(source).body[0]
    assert isinstance(defined, ast.ClassDef)
    for node in defined.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno, node.end_lineno or node.lineno
