"""The provenance of a drawn image inside its PNG: a text chunk of JSON, which travels with the image."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from arrag_jax.errors import UserError
from arrag_jax.json_files import parse_json
from arrag_jax.store.rights import Rights

KEY = "provenance"
SHARES = ("share_retrieved", "share_copied", "share_largest_copy")


def provenance_text(
    texts: Mapping[str, str], record: Mapping[str, Any] | None, rights: Mapping[str, Rights]
) -> dict[str, str]:
    """Returns the text chunk of an image.

    Args:
      texts: its other chunks: prompt, method, seed, model and store with their hashes (``run_record.texts_of``).
      record: its record (``provenance.page_and_record``); None for a method that retrieves nothing.
      rights: licences and sources of stored images, by name.
    """
    told: dict[str, Any] = dict(texts)
    if record is not None:
        told |= {name: record[name] for name in SHARES}
        told["sources"] = [
            {"image": each["source"], "cells": each["cells"], **rights.get(each["source"], Rights())._asdict()}
            for each in record["sources"]
        ]
    return {KEY: json.dumps(told)}


def read_provenance(path: Path) -> dict[str, Any]:
    """Returns the provenance in an image that ``generate`` drew.

    Raises:
      UserError: if the file is no image, or holds no provenance.
    """
    try:
        with Image.open(path) as image:
            image.load()  # chunks may follow the pixels
            text = image.info.get(KEY)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    told = parse_json(text, f"the provenance in {path}") if isinstance(text, str) else None
    if not isinstance(told, dict):
        raise UserError(f"{path} holds no provenance; the PNG files that generate writes do, until a program drops it")
    return told
