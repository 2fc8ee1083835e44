"""DPG-Bench's rules: from answers to questions about an image to its score; pure functions.

Source: DPG-Bench (ELLA, Hu et al., 2024) and its official ``compute_dpg_bench.py``. The mended rule is the one that the
benchmark describes: every row of the CSV is a question, a question counts 0 if any question that it depends on counts
0, whatever the order of the rows, and categories are means over all images after that. ``official`` gives what the
official program prints, with its mistakes:

* the first row of the CSV is skipped;
* an item whose rows do not stand together keeps the last of its groups alone;
* a question counts 0 if a question that it depends on counts 0 at that moment, going through the rows in order;
* an item that depends on a question that is not there is left out, without a word;
* categories hold the answers to the last image of a grid alone, as they were before that.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from arrag_jax.errors import UserError

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
YES = "yes"  # any other answer counts 0
NO_PARENT = 0


class Question(NamedTuple):
    """A question about an item.

    Attributes:
      number: of the question within its item.
      parents: the numbers of the questions that it depends on.
      category: such as "entity - whole".
      text: what is asked.
    """

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


class ItemScore(NamedTuple):
    """The score of an item, in [0, 1].

    Attributes:
      images: the score of each of its images.
      mean: their mean.
      categories: category → one number, 0 or 1, per question that counts for it.
    """

    images: tuple[float, ...]
    mean: float
    categories: dict[str, list[float]]


Items = dict[str, tuple[Question, ...]]


def read_questions(path: Path, official: bool = False) -> Items:
    """Returns the questions of every item of DPG-Bench's CSV.

    Raises:
      UserError: if the file cannot be read or a row is not valid; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the questions of {path} ({error}); give another --questions") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    items: dict[str, dict[int, Question]] = {}
    last = None
    try:
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}, line 1: no column {', '.join(missing)}")
        for number, row in enumerate(rows):
            if official and number == 0:
                continue
            name, question = _of_row(row, f"{path}, line {rows.line_num}")
            held = items.setdefault(name, {})
            if official and name != last:
                held.clear()
            if not official and question.number in held:
                raise UserError(f"{path}, line {rows.line_num}: {name} has a question {question.number} already")
            held[question.number] = question
            last = name
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not a CSV ({error})") from None
    return {name: tuple(questions.values()) for name, questions in items.items()}


def _of_row(row: Mapping[str, str | None], where: str) -> tuple[str, Question]:
    held = {column: row[column] for column in COLUMNS}
    if None in row or any(value is None for value in held.values()):
        raise UserError(f"{where}: it has not as many columns as line 1")
    name, number, parents, category, text = (str(value).strip() for value in held.values())
    try:
        question = Question(
            int(number),
            tuple(int(parent) for parent in parents.split(",") if int(parent) != NO_PARENT),
            category.partition("(")[0].strip(),
            text,
        )
    except ValueError:
        raise UserError(f"{where}: {number!r} and {parents!r} must be whole numbers, one or several") from None
    if not (name and text and question.category):
        raise UserError(f"{where}: item_id, tuple and question_natural_language must not be empty")
    return name, question


def score_item(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> ItemScore:
    """Returns the score of an item by the mended rule.

    Args:
      answers: for each image, question text → answer.

    Raises:
      UserError: if an answer is missing.
    """
    images, categories = [], dict[str, list[float]]()
    for answered in answers:
        scores = {each.number: _number(answered, each) for each in questions}
        changed = True
        while changed:  # a question that becomes 0 can make others 0
            zero = {each.number for each in questions if any(scores.get(parent) == 0 for parent in each.parents)}
            changed = any(scores[number] for number in zero)
            scores |= dict.fromkeys(zero, 0.0)
        for each in questions:
            categories.setdefault(each.category, []).append(scores[each.number])
        images.append(sum(scores.values()) / len(scores))
    return ItemScore(tuple(images), sum(images) / len(images), categories)


def score_item_official(questions: Sequence[Question], answers: Sequence[Mapping[str, str]]) -> ItemScore | None:
    """Returns the score of an item with the official mistakes; None if the official program leaves it out."""
    images, before = [], dict[int, float]()
    for answered in answers:
        scores = {each.number: _number(answered, each) for each in questions}
        before = dict(scores)
        for each in questions:
            for parent in each.parents:
                if parent not in scores:
                    return None
                if scores[parent] == 0:
                    scores[each.number] = 0.0
                    break
        images.append(sum(scores.values()) / len(scores))
    categories = dict[str, list[float]]()
    for each in questions:
        categories.setdefault(each.category, []).append(before[each.number])
    return ItemScore(tuple(images), sum(images) / len(images), categories)


Rule = Callable[[Sequence[Question], Sequence[Mapping[str, str]]], ItemScore | None]


def without_parent(items: Items) -> list[str]:
    """Returns the items in which a question depends on one that is not there."""
    return [
        name
        for name, questions in items.items()
        if any(parent not in {each.number for each in questions} for each in questions for parent in each.parents)
    ]


def _number(answered: Mapping[str, str], question: Question) -> float:
    if question.text not in answered:
        raise UserError(f"no answer to {question.text!r}; every question needs one for every image")
    return float(answered[question.text] == YES)
