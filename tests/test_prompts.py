"""Prompts: each one that we show is a caption that the model has learned, and people may write as people write."""

import ast
import functools
import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from arrag_jax.data.emoji import scenes
from arrag_jax.data.emoji.worlds import STANDARD
from arrag_jax.errors import UserError
from arrag_jax.models.text import SPECIAL, PromptTokenizer, chat_form

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "arrag_jax/assets/emoji_janus"
SHOWN = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
SHOWN += [path for folder in ("arrag_jax", "configs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.*")]


@functools.cache
def text() -> PromptTokenizer:
    return PromptTokenizer.load(ROOT / EMBEDDED)


@functools.cache
def captions() -> frozenset[str]:
    """All captions of the six families without the pairs that training leaves out."""
    one = lambda name, *tint: ("an " if (tint or [name])[0][0] in "aeiou" else "a ") + " ".join([*tint, name])  # noqa: E731
    names = STANDARD.classes.values()
    tinted = [(c.name, tint) for c in names for tint in c.tints if (tint, c.name) not in STANDARD.held_out_colours]
    pairs = [(a.name, b.name) for a, b in itertools.permutations(names, 2)]
    pairs = [pair for pair in pairs if frozenset(pair) not in STANDARD.held_out_pairs]
    return frozenset(
        itertools.chain(
            (one(c.name) for c in names),
            (f"{number} {c.plural}" for c in names for number in scenes.NUMBERS.values()),
            (one(*thing) for thing in tinted),
            (f"{one(a)} {word} {one(b)}" for a, b in pairs for word in ("and", *scenes.RELATIONS)),
            (
                f"{one(*a)} and {one(*b)}"
                for a, b in itertools.permutations(tinted, 2)
                if (a[0], b[0]) in pairs and a[1] != b[1]
            ),
        )
    )


@pytest.mark.slow
def test_the_captions_are_those_of_training():
    seen = {scenes.scene("train", i).caption for i in range(600)}
    assert seen <= captions()
    assert "a blue car" in captions() and not captions() & {"a red car", "a blue fish", "a purple car"}


def shown_prompts() -> list[tuple[str, str, str]]:
    """File, config and prompt of every command that we show."""
    found = []
    for path in SHOWN:
        if path.suffix not in (".py", ".md", ".sh", ""):
            continue
        joined = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        for line in joined.splitlines():
            config = re.search(r"--config[= ](\S+\.py)", line)
            for prompt in re.findall(r"--prompt[= ]\"([^\"]+)\"", line):
                if config:
                    found.append((path.relative_to(ROOT).as_posix(), config[1], prompt))
    return found


def test_each_prompt_of_a_shown_command_is_a_caption():
    found = shown_prompts()
    assert {file for file, _, _ in found} >= {"README.md", "arrag_jax/generate.py", "configs/emoji_daid.py"}
    model_of = functools.cache(lambda config: runpy.run_path(str(ROOT / config))["get_config"]()["model"])
    ours = [row for row in found if Path(model_of(row[1])).name == Path(EMBEDDED).name]
    assert len(ours) >= 8
    # Those of this config ask for what training never showed.
    assert [row for row in ours if row[2] not in captions() and row[1] != "configs/emoji_knowledge.py"] == []
    text()([prompt for _, _, prompt in ours])


def test_each_prompt_of_readmes_program_is_a_caption():
    (listed,) = re.findall(r"PromptTokenizer\.load\(folder\)\((\[.*?\])\)", (ROOT / "README.md").read_text())
    assert set(ast.literal_eval(listed)) <= captions()


@pytest.mark.parametrize(
    "written",
    ["A blue car.", "A BLUE CAR", "a blue car!", "  a  blue\ncar ", "“A blue car…”", "a blue, car", "Ａ　blue　car。",
     "a blue car\u200b", "\ufeffA blue car:", "¿a blue car?"],
)  # fmt: skip
def test_a_prompt_is_read_as_its_words(written):
    for found, expected in zip(text()([written]), text()(["a blue car"]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_captions_are_read_as_before():
    """The words of a caption stand in the chat form one by one."""
    for prompt in sorted(captions())[::500]:
        assert text().tokenizer.decode(text()([prompt])[0][0, 3:-3].tolist()) == prompt


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("A zebra.", "does not know 'zebra'; it knows: a above"),
        ("a cat's ball", 'does not know "cat\'s"'),
        ("a cat and a 🐱", "does not know '🐱'"),
        ("a cat + a dog", r"does not know '\+'"),
        ("...", "a prompt is empty"),
        ("“”", "a prompt is empty"),
        ("a cat <unk>", "a prompt holds '<unk>'"),
    ],
)
def test_other_words_are_said(written, said):
    with pytest.raises(UserError, match=said):
        text()([written])


def test_a_word_in_capitals_that_is_known_stays():
    upper = PromptTokenizer.of_words(["a Cat", "a cat", "NASA"])
    (ids,), _ = upper(["A Cat. NASA!"])
    assert [upper.tokenizer.id_to_token(int(i)) for i in ids][3:-3] == ["a", "Cat", "NASA"]


def test_bytes_that_are_no_text_are_said():
    with pytest.raises(UserError, match="is not UTF-8 text"):
        text()(["a cat \udcff"])


@pytest.mark.parametrize("prompt", ["A red car.", "两只猫。", "  Ａ cat…", "naïve: «кот»"])
def test_a_tokenizer_of_bytes_reads_every_sign(prompt):
    """Published models know capitals and marks: their prompts are left as they are, but for the space around them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    (ids,), _ = PromptTokenizer(tokenizer)([prompt])
    assert tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) == chat_form(prompt.strip())
