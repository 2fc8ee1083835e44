"""The licence and the source that a data set states of an image, in a JSON object or in columns of a table."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from arrag_jax.errors import UserError
from arrag_jax.json_files import parse_json

LICENCE, SOURCE = ("licence", "license", "license_name"), ("source", "url", "original_url")  # keys, in this order


class Rights(NamedTuple):
    """The rights of an image; "" = unknown."""

    licence: str = ""
    source: str = ""


UNSTATED = Rights()


def rights_of(record: Mapping[str, Any]) -> Rights:
    """Returns the rights that a record states, in keys of any case; licences are compared in lower case."""
    named = {key.lower(): _text(record[key]) for key in reversed(list(record))}
    licence, source = (next((named[key] for key in keys if named.get(key)), "") for keys in (LICENCE, SOURCE))
    return Rights(licence.lower(), source)


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return " ".join(text.split()) if isinstance(text, str) else ""


def rights_of_example(example: Mapping[str, Any]) -> Rights:
    """Returns the rights of an example: its own "rights", or those in its features."""
    return example["rights"] if "rights" in example else rights_of(example)


def line_of(rights: Rights) -> str:
    """Returns the rights as one line of text; "" if they are unknown."""
    return json.dumps(rights._asdict()) if any(rights) else ""


def rights_in(line: str, about: str) -> Rights:
    """Returns the rights in a line; raises UserError, which begins with ``about``, if it is damaged."""
    record = parse_json(line, about) if line else {}
    if not isinstance(record, dict):
        raise UserError(f"{about} is damaged")
    return rights_of(record)


def agreed(pairs: Iterable[tuple[str, Rights]]) -> dict[str, Rights]:
    """Returns the rights of images by name; images of one name have none unless all of them have the same."""
    found: dict[str, Rights] = {}
    for name, rights in pairs:
        found[name] = rights if found.get(name, rights) == rights else UNSTATED
    return {name: rights for name, rights in found.items() if any(rights)}
