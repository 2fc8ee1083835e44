"""Draws text in any script: chooses a font for each character, lays out lines, and replaces missing characters.

PIL's own font comes first, so that figures in plain English look the same everywhere. The Noto fonts of the packages
``manimgx-fonts`` and ``manimgx-fonts-cjk`` follow, if they are installed. A character that no font has is replaced by
similar Latin letters, or else by its Python escape. So no character is drawn as an empty box.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

FONT_SIZE = 14
SPACING = 2  # pixels between lines
PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
NO_SIGN = "\U0010fffe"  # a noncharacter, for which every font draws its box
# Replacements for characters that no font has.
LATIN = dict(zip("λτ×−–—·’≤≥→", ("lambda", "tau", *"x----'", "<=", ">=", "->"), strict=True))
JOINERS = "\u200c\u200d"  # they control the shape of the adjacent characters
KANA, HANGUL = ("\u3040", "\u30ff"), ("\uac00", "\ud7a3")


@dataclasses.dataclass(frozen=True)
class Face:
    """A font: its file ("" = PIL's own font), and the number of the face in the file."""

    file: str
    index: int = 0


OWN = Face("")


class Run(NamedTuple):
    """Adjacent characters of a line that one font draws."""

    face: Face
    words: str


def text_size(words: str) -> tuple[int, int]:
    """Returns the width and height in pixels of a text's box; every line has the same height."""
    lines = _laid_out(words)
    ascent, descent = _extent(lines)
    return round(max(map(_length, lines))), len(lines) * (ascent + descent + SPACING) - SPACING


def write(draw: ImageDraw.ImageDraw, x: int, y: int, words: str, align: str, color: tuple[int, int, int]) -> None:
    """Draws a text whose box has its upper left corner at (x, y).

    Args:
      align: alignment of the lines: "left", "center" or "right".
    """
    lines = _laid_out(words)
    if all(run.face == OWN for line in lines for run in line):
        plain = "\n".join("".join(run.words for run in line) for line in lines)
        draw.multiline_text((x, y), plain, color, font_of(OWN), align=align, spacing=SPACING)
        return
    ascent, descent = _extent(lines)
    most = max(map(_length, lines))
    for line in lines:
        left = x + (most - _length(line)) * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
        for run in line:
            draw.text((left, y + ascent), run.words, color, font_of(run.face), anchor="ls")
            left += font_of(run.face).getlength(run.words)
        y += ascent + descent + SPACING


def wrapped(words: str, width: int) -> str:
    """Returns the text in lines of at most ``width`` pixels; a long word can make a line longer."""
    if words.isascii():
        letters = max(1, int(width / (font_of(OWN).getlength("abcdefghij klmnop") / 17)))
        return "\n".join(textwrap.wrap(words, letters, break_long_words=False)) or " "
    lines = [""]
    units = _units(" ".join(words.split()))
    parts = ([unit] if text_size(unit)[0] <= width else _clusters(unit) for unit in units)
    for unit in itertools.chain.from_iterable(parts):
        if lines[-1] and text_size(lines[-1] + unit)[0] > width:
            lines.append(unit.lstrip())
        else:
            lines[-1] += unit
    return "\n".join(lines) or " "


def shortened(words: str, width: int) -> str:
    """Returns a path in one line of at most ``width`` pixels; a long path is cut so that its file name remains."""
    words = words.replace("\n", "\\n")
    if text_size(words)[0] <= width:
        return words
    name = len(re.split("[/!]", words)[-1]) + 1
    for kept in range(min(len(words) - 1, width), 1, -1):
        head = min(kept // 3, kept - name) if kept > name else kept // 3
        short = f"{words[:head]}…{words[head - kept :]}"
        if text_size(short)[0] <= width:
            return short
    return "…"


@functools.cache
def font_of(face: Face, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """Returns the regular style of a font at ``FONT_SIZE``."""
    if face == OWN:
        default = ImageFont.load_default(FONT_SIZE)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return default
    font = ImageFont.truetype(face.file, FONT_SIZE, index=face.index, layout_engine=layout)
    font.set_variation_by_axes([400])
    return font


@functools.cache
def faces(cjk: int = 2) -> tuple[Face, ...]:
    """Returns the available fonts, in the order in which they are tried for a character.

    Args:
      cjk: number of the face in the font of Chinese, Japanese and Korean; these share characters but differ in shapes.
    """
    files: list[Path] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            files += [path for path in sorted(Path(folder).glob("*.tt[fc]")) if "Italic" not in path.name]
    first = [path for path in files if path.name.startswith("NotoSans[")]
    order = [*first, *(path for path in files if path not in first)]
    return OWN, *(Face(str(path), cjk if path.suffix == ".ttc" else 0) for path in order)


@functools.cache
def has(face: Face, sign: str) -> bool:
    """Returns whether a font has a character, that is, does not draw its box for missing characters."""
    if sign == " ":
        return True
    font = font_of(face, ImageFont.Layout.BASIC)
    drawn, box = (font.getmask(text) for text in (sign, NO_SIGN))
    return (drawn.size, bytes(drawn)) != (box.size, bytes(box))


def _face_of(sign: str, known: Sequence[Face]) -> Face | None:
    return next((face for face in known if has(face, sign)), None)


def _joins(sign: str) -> bool:
    """Returns whether a character combines with the character before it."""
    return unicodedata.category(sign) in ("Mn", "Mc", "Me") or sign in JOINERS


def _drawable(words: str, known: Sequence[Face]) -> Iterator[tuple[str, Face]]:
    """Yields the characters of a line with their fonts; replaces characters that no font has."""
    last, escaped = OWN, False  # font of the previous character, and whether it was escaped
    for sign in unicodedata.normalize("NFC", words):
        sign = " " if unicodedata.category(sign) == "Zs" else sign
        if _joins(sign) and not escaped:  # a combining mark that the font lacks is dropped
            if last != OWN and (sign in JOINERS or has(last, sign)):
                yield sign, last
            continue
        if unicodedata.category(sign)[0] == "C":
            face = None
        elif last != OWN and has(last, sign) and (sign == " " or not sign.isascii()):
            face = last  # keeps words of one script in one run, so that they are shaped and ordered together
        else:
            face = _face_of(sign, known)
        if face is None:
            near = LATIN.get(sign) or "".join(c for c in unicodedata.normalize("NFKD", sign) if not _joins(c))
            escaped = not (near and near.isascii() and near.isprintable())
            yield from ((c, OWN) for c in (sign.encode("unicode_escape").decode() if escaped else near))
        else:
            yield sign, face
            escaped = False
        last = face or OWN


@functools.lru_cache(1024)
def _laid_out(words: str) -> tuple[tuple[Run, ...], ...]:
    """Returns the lines of a text as runs, from left to right."""
    cjk = 0 if _any_between(words, KANA) else 1 if _any_between(words, HANGUL) else 2
    known = faces(cjk)
    return tuple(_ordered(_runs(_drawable(line, known))) for line in words.split("\n"))


def _any_between(words: str, ends: tuple[str, str]) -> bool:
    return any(ends[0] <= sign <= ends[1] for sign in words)


def _runs(signs: Iterator[tuple[str, Face]]) -> list[Run]:
    runs = []
    for face, group in itertools.groupby(signs, key=lambda pair: pair[1]):
        words = "".join(sign for sign, _ in group)
        bare = words.rstrip(" ")  # a space at the end separates two runs, also after reordering
        runs += [Run(face, bare)] if bare else []
        runs += [Run(OWN, words[len(bare) :])] if bare != words else []
    return runs


def _ordered(runs: list[Run]) -> tuple[Run, ...]:
    """Returns runs in their order on the page; runs of right-to-left scripts are reversed."""
    ways = [_way(run.words) for run in runs]
    base = next((way for way in ways if way), "L")
    groups = [
        list(group)[:: -1 if way == "R" else 1]
        for way, group in itertools.groupby(runs, key=lambda run: _way(run.words) or base)
    ]
    return tuple(itertools.chain(*(groups[::-1] if base == "R" else groups)))


def _way(words: str) -> str:
    """Returns the direction of the first character that has one: "L" or "R"; "" if none has."""
    found = (unicodedata.bidirectional(sign) for sign in words)
    return next(("L" if way == "L" else "R" for way in found if way in ("L", "R", "AL")), "")


def _length(line: Sequence[Run]) -> float:
    return sum((font_of(run.face).getlength(run.words) for run in line), 0.0)


def _extent(lines: Sequence[Sequence[Run]]) -> tuple[int, int]:
    """Returns the largest heights above and below the baseline among the fonts of the lines."""
    used = {OWN, *(run.face for line in lines for run in line)}
    return tuple(max(sizes) for sizes in zip(*(font_of(face).getmetrics() for face in used), strict=True))


def _units(words: str) -> list[str]:
    """Returns the parts between which a line can break.

    A part is a word with the space before it, or one character of a script that has no spaces between words.
    """
    units: list[str] = []
    ended, known = True, faces()
    for cluster in _clusters(words):
        alone = unicodedata.east_asian_width(cluster[0]) in "WF" or _face_of(cluster[0], known) is None
        if ended or cluster == " " or (alone and units[-1] != " "):
            units.append(cluster)
        else:
            units[-1] += cluster
        ended = alone
    return units


def _clusters(words: str) -> list[str]:
    """Returns the characters of a text, each together with its combining characters."""
    clusters: list[str] = []
    for sign in words:
        if clusters and _joins(sign):
            clusters[-1] += sign
        else:
            clusters.append(sign)
    return clusters
