"""Reads untrusted JSON: limits its size and depth, and reports invalid JSON in one line."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from arrag_jax.errors import UserError

MAX_BYTES = 64 * 2**20  # more than the weights index of a model with 10^6 tensors needs
MAX_DEPTH = 64  # maximum depth of nested objects and lists
LFS_POINTER = b"version https://git-lfs"
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NO_BRACKET = re.compile(r"[^\[\]{}]+")


def parse_json(text: str | bytes, where: str, constants: bool = False) -> Any:
    """Returns the value that a JSON text holds.

    Args:
      text: the text, or its bytes in UTF-8; a byte order mark is skipped.
      where: name of the text in messages: a file, or a member of an archive.
      constants: accept NaN and infinities, which other programs write for a missing number.

    Raises:
      UserError: if the text is not UTF-8 or not JSON, is nested too deeply, or holds a lone surrogate or, without
        ``constants``, NaN or an infinity.
    """
    try:
        if isinstance(text, bytes):
            require_no_pointer(text, where)
            text = text.decode("utf-8-sig")
        if _depth(text) > MAX_DEPTH:
            raise UserError(f"{where} is nested too deeply to be JSON of this kind")
        value = json.loads(text, parse_constant=float if constants else _refuse)
        _require_plain(value)
        return value
    except UserError:
        raise
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError and numbers of too many digits are ValueErrors
        raise UserError(f"{where} is not JSON ({error})") from None


def read_bounded(path: Path, max_bytes: int, otherwise: str, part: str = "") -> bytes:
    """Returns the content of a small file.

    Args:
      otherwise: what a larger file is, for the message.
      part: what is read of the file, such as "the prompts of ", for the message.

    Raises:
      UserError: if the file cannot be read, or is larger than ``max_bytes``.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {part}{path}: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes:,} bytes; it is {otherwise}")
    return content


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value that a JSON file holds.

    Raises:
      UserError: if the file cannot be read, is larger than ``max_bytes``, or ``parse_json`` refuses its text.
    """
    return parse_json(read_bounded(path, max_bytes, "not a JSON file of this kind"), str(path))


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      UserError: as ``read_json``, or if the value in the file is not an object.
    """
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def require_no_pointer(head: bytes, where: str) -> None:
    """Raises UserError if a file is only a Git LFS pointer; ``head`` holds the file's first bytes."""
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{where} is not the file itself but a pointer of Git LFS to it; fetch it: run git lfs pull where it was "
            "cloned, or download the file"
        )


def _depth(text: str) -> int:
    """Returns how deeply the objects and lists of a JSON text are nested.

    The parser recurses, and whatever the interpreter runs at the bottom of a deep recursion fails, the finalizers of
    other code's objects among it. So the depth is known before the text is parsed.
    """
    brackets = np.frombuffer(NO_BRACKET.sub("", STRING.sub("", text)).encode(), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.cumsum(np.where(opening, 1, -1)).max(initial=0))


def _require_plain(value: Any) -> None:
    """Raises ValueError if a text in a value holds a lone surrogate."""
    level = [value]
    while level:
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
