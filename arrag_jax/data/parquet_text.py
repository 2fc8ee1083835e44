"""Text in values of Parquet columns."""

from typing import Any


def text(value: Any) -> str:
    """Returns the value of a key or a status as text; "" for null."""
    found = value.as_py()
    return "" if found is None else str(found)


def caption_text(value: Any) -> str:
    """Returns a caption in one line; of a list, the first that is not empty; "" for null."""
    found = value.as_py()
    for each in found if isinstance(found, list) else [found]:
        words = each.decode("utf-8", "replace") if isinstance(each, bytes) else each
        if isinstance(words, str) and words.strip():
            return " ".join(words.split())
    return ""
