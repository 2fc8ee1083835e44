"""Reads prompt sets: jsonl, json, csv, txt, or a folder of text files with one prompt each.

=======  ====================================================  ====================================================
file     prompt                                                name
=======  ====================================================  ====================================================
.jsonl   ``prompt``, ``caption`` or ``text`` of each object    ``name`` or ``id``, else the line's number from 00000
.json    {name: {"prompt": …, "category": …}}, {name: prompt}  the key
.json    a list of such objects, or of prompts                 as for .jsonl
.csv     column ``prompt``, ``caption`` or ``text``            ``name``, ``id``, ``image_id`` or ``item_id``
.txt     every line that is not blank                          its number from 00000
folder   the whole text of every .txt file                     the file's name without .txt
=======  ====================================================  ====================================================

A CSV may have several rows of one name with the same prompt, as DPG-Bench's has; they are one prompt.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arrag_jax.errors import UserError, printable
from arrag_jax.interfaces import Prompt
from arrag_jax.json_files import MAX_BYTES, parse_json, read_bounded

TEXTS = ("prompt", "caption", "text")
NAMES = ("name", "id", "image_id", "item_id")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")  # files and folders are named so
LARGEST = 20_000  # characters of a prompt; no text encoder reads more


class _Found(NamedTuple):
    where: str
    name: Any
    text: Any
    category: Any = None
    line: str = ""


def read_prompts(path: str, limit: int = 0) -> list[Prompt]:
    """Returns the prompts of a file or folder, sorted by name.

    Args:
      path: see the module's docstring.
      limit: keep the first ``limit`` prompts alone; 0 = all.

    Raises:
      UserError: if there is no prompt, or one is not valid; the message names the file and the line.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.glob("*.txt"))
        found = [_Found(str(file), file.stem, _text(file).strip()) for file in files]
    else:
        if place.suffix not in READERS:
            raise UserError(f"--prompts={path} is no prompt set; give .jsonl, .json, .csv, .txt or a folder of .txt")
        found = list(READERS[place.suffix](place, _text(place)))
    prompts: dict[str, Prompt] = {}
    for each in found:
        prompt = _checked(each)
        if prompts.setdefault(prompt.name, prompt).text != prompt.text:
            raise UserError(f"{each.where}: the name {prompt.name!r} is taken by another prompt; names must differ")
    if not prompts:
        raise UserError(f"--prompts={path} holds no prompt")
    return [prompts[name] for name in sorted(prompts)][: limit or None]


def _text(path: Path) -> str:
    content = read_bounded(path, MAX_BYTES, "no prompt set", "the prompts of ")
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
    return content.decode("utf-8-sig")


def _checked(found: _Found) -> Prompt:
    where, name, text, category, line = found
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: no prompt; it must be a text under {', '.join(TEXTS)}")
    if len(text) > LARGEST:
        raise UserError(f"{where}: a prompt of {len(text):,} characters; at most {LARGEST:,} are read")
    name = str(name) if isinstance(name, str | int) and not isinstance(name, bool) else ""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{where}: the name {printable(name)[:80]!r} cannot name a file; use letters, digits, and . _ + -"
        )
    if category is not None and not isinstance(category, str):
        raise UserError(f"{where}: category must be a text")
    return Prompt(name, text, category or "", line)


def _of_object(where: str, record: Any, name: Any, line: str = "") -> _Found:
    if isinstance(record, str):
        return _Found(where, name, record, line=line)
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: neither a prompt nor an object that holds one")
    text = next((record[key] for key in TEXTS if key in record), None)
    own = next((record[key] for key in NAMES if key in record), name)
    return _Found(where, own, text, record.get("category"), line)


def _jsonl(path: Path, text: str) -> Iterator[_Found]:
    number = 0
    for place, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {place}"
            yield _of_object(where, parse_json(line, where), f"{number:05d}", line.removesuffix("\r"))
            number += 1


def _json(path: Path, text: str) -> Iterator[_Found]:
    content = parse_json(text, str(path))
    if isinstance(content, list):
        content = {f"{number:05d}": record for number, record in enumerate(content)}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds neither a list nor an object of prompts")
    for name, record in content.items():
        yield _of_object(f"{path}, entry {printable(name)[:80]!r}", record, name)


def _csv(path: Path, text: str) -> Iterator[_Found]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = [column.strip() for column in next(rows, [])]
        texts, names = ([key for key in keys if key in head] for keys in (TEXTS, NAMES))
        if not texts:
            raise UserError(f"{path}, line 1: no column {', '.join(TEXTS)} among {printable(', '.join(head))[:200]}")
        number = 0
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(row):
                continue
            if len(row) != len(head):
                raise UserError(f"{where}: {len(row)} columns, where line 1 names {len(head)}")
            record = dict(zip(head, row, strict=True))
            name = record[names[0]] if names else f"{number:05d}"
            yield _Found(where, name, record[texts[0]], record.get("category"))
            number += 1
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not a CSV ({error})") from None


def _txt(path: Path, text: str) -> Iterator[_Found]:
    lines = [(place, line.strip()) for place, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, (place, line) in enumerate(lines):
        yield _Found(f"{path}, line {place}", f"{number:05d}", line)


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}
