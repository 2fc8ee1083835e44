"""Cleans captions in the way in which LlamaGen's training captions were cleaned.

The rules also remove real words ("png image", "page 7", "512x512"), because the model never saw them in training. They
are applied twice, as in the official code. The official code repairs wrongly decoded characters with the ``ftfy``
library. If that library is not installed, characters beyond ASCII are kept as they are.
"""

import functools
import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from arrag_jax import progress

_SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_MARKS = "#®•©™&@·º½¾¿¡§~()[]{}|\\/*"

Rules = tuple[tuple[str, str], ...]  # (pattern, replacement), applied in order

# Applied before HTML tags are removed.
_ADDRESSES: Rules = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
_SIGNS: Rules = (
    (r"@\w+\b", ""),  # account names
    ("[\u31c0-\u4dff\u4e00-\u9fff]+", ""),  # Chinese, Japanese and Korean characters
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_ENDINGS})", ""),  # file names
    ("[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (f"[{re.escape(_MARKS)}]+", " "),
    (r"\s+\.\s+", " "),
)
# Applied after wrongly decoded characters are repaired.
_WORDS: Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_ENDINGS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS: Rules = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(caption: str) -> str:
    """Returns a caption after two passes of the official cleaning rules, as for the model's training captions."""
    return _once(_once(caption))


def _once(caption: str) -> str:
    text = _apply(_ADDRESSES, unquote_plus(caption).strip().lower())
    text = _apply(_SIGNS[:2], _without_html(text))
    text = "".join("-" if unicodedata.category(sign) == "Pd" else sign for sign in text)
    text = _apply(_SIGNS[2:], text)
    if len(re.findall("[-_]", text)) > 3:  # many hyphens mean the name of a file or page
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_repair(text)))
    return _apply(_ENDS, _apply(_WORDS, text).strip()).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """An HTML parser that collects the text between tags."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _without_html(text: str) -> str:
    """Returns the text between the tags, with entities decoded."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def _repair(text: str) -> str:
    """Returns a text with wrongly decoded characters repaired, if the ``ftfy`` library is installed."""
    if text.isascii():
        return text
    try:
        import ftfy  # an optional extra
    except ImportError:
        _tell_once()
        return unicodedata.normalize("NFC", text)
    return ftfy.fix_text(text)


@functools.cache
def _tell_once() -> None:
    progress.tell("ftfy is not installed: letters beyond ASCII in captions are read as they stand (pip install ftfy)")
