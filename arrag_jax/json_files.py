"""Reads JSON that may come from anybody: bounded, and one line where it is not what it should be."""

import json
from pathlib import Path
from typing import Any, NoReturn

from arrag_jax.errors import UserError

MAX_BYTES = 64 * 2**20  # the weights index of a model of 10^6 tensors is smaller
MAX_DEPTH = 64  # objects and lists within one another
LFS_POINTER = b"version https://git-lfs"


def parse_json(text: str | bytes, where: str, constants: bool = False) -> Any:
    """Returns the value that a JSON text holds.

    Args:
      text: the text, or its bytes in UTF-8 (a byte order mark is skipped).
      where: how the error calls it: a file, or a member of an archive.
      constants: take NaN and infinities, which other programs write where a number is missing.

    Raises:
      UserError: it is not UTF-8 or not JSON, holds NaN or an infinity that is not taken, or half a character, or is
        nested too deeply.
    """
    try:
        if isinstance(text, bytes):
            require_no_pointer(text, where)
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=float if constants else _refuse)
        _require_plain(value)
        return value
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be JSON of this kind") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError and numbers of too many digits are ValueErrors
        raise UserError(f"{where} is not JSON ({error})") from None


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value that a JSON file holds.

    Raises:
      UserError: as ``parse_json``, or the file cannot be read or is larger than ``max_bytes``.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes:,} bytes; it is not a JSON file of this kind")
    return parse_json(content, str(path))


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the object that a JSON file holds; errors as ``read_json``, and where it holds no object."""
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def require_no_pointer(head: bytes, where: str) -> None:
    """Raises UserError where the first bytes of a file are those of a pointer of Git LFS."""
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{where} is not the file itself but a pointer of Git LFS to it; fetch it: run git lfs pull where it was "
            "cloned, or download the file"
        )


def _require_plain(value: Any) -> None:
    """Raises RecursionError or ValueError where a value is nested too deeply or holds half of a surrogate pair."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # a UnicodeEncodeError is a ValueError
            elif isinstance(item, dict):
                inner += (*item, *item.values())
            elif isinstance(item, list):
                inner += item
        level = inner


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")
