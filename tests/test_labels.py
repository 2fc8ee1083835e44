"""Labels of any script: every sign is drawn by a font that has it, or plainly written otherwise; no empty boxes."""

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw

from arrag_jax.figures import grids, lettering
from arrag_jax.figures.canvas import Canvas
from arrag_jax.figures.lettering import OWN, font_of, has, shortened, text_size, wrapped
from helpers.pixels import random_images

FONTS = all(importlib.util.find_spec(package) for package in lettering.PACKAGES)
with_fonts = pytest.mark.skipif(not FONTS, reason="the packages of fonts are not installed")
SCRIPTS = {
    "Chinese": "两只猫坐在红色的汽车上",
    "Japanese": "赤い車と青い魚",
    "Korean": "빨간 자동차와 물고기",
    "Cyrillic": "красная машина и рыба",
    "Greek": "το κόκκινο αυτοκίνητο",
    "Arabic": "قطة حمراء فوق سيارة",
    "Hebrew": "חתול אדום",
    "Hindi": "मेज पर लाल सेब",
    "Thai": "แมวสองตัว",
    "accents": "naïve café, Łódź",
    "emoji": "🐱 and 🚗",
}


@pytest.fixture(params=[False, True] if FONTS else [False], ids=lambda found: "with fonts" if found else "without")
def fonts(request, monkeypatch):
    """With the packages of fonts, and without them."""
    if not request.param:
        monkeypatch.setattr(lettering, "PACKAGES", ())
    caches = (lettering.faces, lettering._laid_out)
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


def inked(words: str, height: int = 60, width: int = 900) -> np.ndarray:
    canvas = Canvas(height, width)
    canvas.text(2, 2, words, "la")
    return canvas.pixels()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_sign_is_had_by_its_font(fonts, script):
    """What is drawn is laid out of signs that their fonts have."""
    for run in (run for line in lettering._laid_out(SCRIPTS[script]) for run in line):
        assert all(has(run.face, sign) for sign in run.words)
        assert fonts or run.face == OWN


@with_fonts
@pytest.mark.parametrize("script", SCRIPTS)
def test_with_fonts_nothing_is_written_otherwise(script):
    runs = [run for line in lettering._laid_out(SCRIPTS[script]) for run in line]
    drawn = sorted(sign for run in runs for sign in run.words)
    assert drawn == sorted(SCRIPTS[script])
    assert {run.face for run in runs} - {OWN} or SCRIPTS[script].isascii()


def test_texts_that_differ_are_drawn_differently(fonts):
    drawn = [inked(words).tobytes() for words in SCRIPTS.values()] + [inked("").tobytes()]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("sign", ["\U00013000", "\ue000", "\x1b", "\u200b", "\u202e", "\x07", "\udcff"])
def test_a_sign_that_no_font_has_is_escaped(fonts, sign):
    escaped = sign.encode("unicode_escape").decode()
    np.testing.assert_array_equal(inked(f"a {sign} b"), inked(f"a {escaped} b"))


def test_without_fonts_latin_letters_stand_in(monkeypatch):
    monkeypatch.setattr(lettering, "faces", lambda cjk=2: (OWN,))
    lettering._laid_out.cache_clear()
    for words, same in {"λ ≤ 3 → é": "lambda <= 3 -> e", "ﬁsh ½": "fish 1\\u20442", "a\u00a0b": "a b"}.items():
        plain = inked(same) if "\\u" not in same else inked(words)
        np.testing.assert_array_equal(inked(words), plain)
    np.testing.assert_array_equal(inked("两"), inked("\\u4e24"))
    np.testing.assert_array_equal(inked("मे"), inked("\\u092e\\u0947"))  # its mark is not lost
    lettering._laid_out.cache_clear()


def test_plain_english_is_drawn_by_pils_own_font_as_it_draws_it(fonts):
    image = Image.new("RGB", (900, 60), (255, 255, 255))
    words = "a cat, drawn plain:\n2 x 3 = 6"
    ImageDraw.Draw(image).multiline_text((2, 2), words, (30, 30, 30), font_of(OWN), spacing=2)
    np.testing.assert_array_equal(inked(words), np.asarray(image))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_box_holds_all_the_ink(fonts, script):
    words = wrapped(SCRIPTS[script], 90)
    width, height = text_size(words)
    page = inked(words, 400, 1200)
    ink = np.argwhere((page < 255).any(-1))
    assert ink.min() >= 0 and ink[:, 0].max() < 2 + height + 2 and ink[:, 1].max() < 2 + width + 2
    assert len(ink) > 20


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("width", [60, 170])
def test_lines_are_no_wider_than_told(fonts, script, width):
    """But for a single sign, with its marks, that is wider."""
    text = SCRIPTS[script] * 3
    lines = wrapped(text, width).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    sign = max(text_size(cluster)[0] for cluster in lettering._clusters(text))
    assert all(text_size(line)[0] <= max(width, sign) for line in lines)


def test_a_line_from_right_to_left_stands_so(fonts):
    if not fonts:
        pytest.skip("needs the fonts")
    (line,) = lettering._laid_out("חתול 猫")
    assert [run.words for run in line] == ["猫", " ", "חתול"]
    (line,) = lettering._laid_out("a חתול b")
    assert "".join(run.words for run in line) == "a חתול b"


@pytest.mark.parametrize(
    "path",
    ["holiday/beach.jpg", "a/" * 60 + "beach_0001.jpeg", "x" * 300 + ".png", "a\nb.png", "фото/" * 20 + "машина.png"],
)
def test_a_long_path_keeps_its_end(fonts, path):
    short = shortened(path, 200)
    assert text_size(short)[0] <= 200 and "\n" not in short
    assert short.endswith(path[-4:])
    if "beach" in path:
        assert short.endswith(path.split("/")[-1])


def test_labels_of_any_script_stand_in_a_grid(fonts):
    images = random_images(1, 2 * len(SCRIPTS))
    rows = [(words, images[2 * i : 2 * i + 2]) for i, words in enumerate(SCRIPTS.values())]
    page = grids.labelled_grid(rows, ["猫", "λ 0.1"], scale=3)
    assert page.shape[1] < 12 * 6 + 4 * 12 + 260
