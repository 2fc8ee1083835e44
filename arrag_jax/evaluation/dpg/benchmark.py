"""The benchmark ``dpg``: answers to questions about every image of a grid, and scores with intervals."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arrag_jax.command import Flag
from arrag_jax.errors import UserError
from arrag_jax.evaluation.dpg.answers import OFFICIAL_NAME, Answerer, open_answerer
from arrag_jax.evaluation.dpg.rules import (
    Items,
    read_questions,
    score_item,
    score_item_official,
    without_parent,
)
from arrag_jax.evaluation.layouts import Grids, read_rgb
from arrag_jax.evaluation.line_log import IMAGE, continued, image_hash
from arrag_jax.evaluation.measurements import figure_of
from arrag_jax.files import sha256_of
from arrag_jax.interfaces import Figure, ImageFile, Measurement, Prompt

ANSWERS = "answers.jsonl"
COPIES = (1, 4)
NAMED = 5  # items that a note names
PERCENT = 100.0


class DpgBench:
    """A ``FolderBenchmark`` over a prompt set whose names are the item ids of DPG-Bench's CSV.

    Raises:
      UserError: if there are neither 1 nor 4 images per prompt.
    """

    flags: ClassVar = {
        "questions": Flag("DPG-Bench's CSV of questions", "", path=True),
        "answers": Flag("what answers them: file:PATH or vqa:FOLDER (docs/benchmarks.md)", ""),
        "official_bugs": Flag("score with the mistakes of the official program", False),
    }

    def __init__(self, prompts: Sequence[Prompt], copies: int, questions: str, answers: str, official_bugs: bool):
        self.prompts, self.copies, self.layout = prompts, copies or COPIES[-1], Grids()
        if self.copies not in COPIES:
            raise UserError(f"--copies={copies}: a grid of DPG-Bench holds 4 images; give 4, or 1 for no grid")
        self._csv, self._given, self._official = questions, answers, official_bugs
        self._items: Items = {}
        self._answerer: Answerer | None = None

    def protocol(self) -> dict[str, Any]:
        """Reads the questions and opens what answers them; returns what identifies both."""
        for name, value in {"questions": self._csv, "answers": self._given}.items():
            if not value:
                raise UserError(f"dpg needs --{name}; give it, or --draw_only to draw alone")
        self._items = read_questions(Path(self._csv), self._official)
        unknown = [prompt.name for prompt in self.prompts if prompt.name not in self._items]
        if unknown and not self._official:
            raise UserError(f"{self._csv} has no question about {_some(unknown)}; give the CSV of these prompts")
        self._answerer = open_answerer(self._given)
        return {
            "questions": sha256_of(Path(self._csv)),
            "answers": self._answerer.facts(),
            "official_bugs": self._official,
        }

    def measure(self, folder: Path, images: Sequence[ImageFile], engine: Any = None) -> Measurement:
        """Writes answers.jsonl, image by image; returns the score and those of the categories."""
        answerer = self._answerer
        assert answerer is not None  # ``protocol`` is called first
        images = [image for image in images if image.prompt.name in self._items]
        self._require_one_size(folder, images)
        keys = [
            {
                "filename": image.path,
                IMAGE: image_hash(folder / image.path),
                "questions": [each.text for each in self._items[image.prompt.name]],
            }
            for image in images
        ]
        header = {"model": answerer.facts()["name"], "made_with": answerer.facts(), "copies": self.copies}

        def answered(numbers: list[int]) -> Iterator[dict[str, Any]]:
            for image, key in ((images[i], keys[i]) for i in numbers):
                yield {"answers": list(self._answers(answerer, folder, image, key["questions"]))}

        entries = continued(folder / ANSWERS, header, keys, answered, "answering")
        return self._measurement([image.prompt.name for image in images], [entry["answers"] for entry in entries])

    def _answers(
        self, answerer: Answerer, folder: Path, image: ImageFile, questions: Sequence[str]
    ) -> Iterator[dict[str, str]]:
        pixels = read_rgb(folder / image.path) if answerer.from_images else None
        for number in range(self.copies):
            part = None if pixels is None else part_of(pixels, number, self.copies)
            answers = answerer.answer(image.prompt.name, number, part, questions)
            yield dict(zip(questions, answers, strict=True))

    def _require_one_size(self, folder: Path, images: Sequence[ImageFile]) -> None:
        first: tuple[int, int] | None = None
        for image in images:
            with Image.open(folder / image.path) as opened:
                size = opened.size
            if first not in (None, size):
                raise UserError(f"{folder / image.path} has {size} pixels, others have {first}; draw it again")
            if self.copies > 1 and (size[0] % 2 or size[1] % 2):
                raise UserError(f"{folder / image.path} is no grid of 2 x 2: its sides are {size}; give --copies=1")
            first = size

    def _measurement(self, names: Sequence[str], answers: Sequence[Sequence[dict[str, str]]]) -> Measurement:
        rule = score_item_official if self._official else score_item
        values: dict[str, dict[str, tuple[float, float]]] = {"prompts": {}}
        left_out = []
        for name, given in zip(names, answers, strict=True):
            score = rule(self._items[name], given)
            if score is None:
                left_out.append(name)
                continue
            values["prompts"][name] = (score.mean, 1.0)
            for category, numbers in score.categories.items():
                broad = category.partition("-")[0].strip()
                for part in dict.fromkeys((broad, category)):
                    before, weight = values.setdefault(f"category {part}", {}).get(name, (0.0, 0.0))
                    count = weight + len(numbers)
                    values[f"category {part}"][name] = ((before * weight + sum(numbers)) / count, count)
        parts = sorted(part for part in values if part != "prompts")
        parts.sort(key=lambda part: " - " in part)  # broad ones first
        figures: dict[str, Figure] = {"DPG score": figure_of(values, ["prompts"], PERCENT)}
        figures |= {part.removeprefix("category "): figure_of(values, [part], PERCENT) for part in parts}
        return Measurement(figures, values, tuple(self._notes(names, left_out)))

    def _notes(self, names: Sequence[str], left_out: Sequence[str]) -> Iterator[str]:
        assert self._answerer is not None
        who = self._answerer.facts()["name"]
        if who != OFFICIAL_NAME or not self._official:
            rule = "with the official mistakes" if self._official else "by the mended rule, without --official_bugs"
            yield f"not comparable with published DPG-Bench: {who} answers, scored {rule}"
        unknown = [prompt.name for prompt in self.prompts if prompt.name not in self._items]
        if left_out or unknown:
            yield f"left out, as by the official program: {_some([*left_out, *unknown])}"
        broken = [] if self._official else [name for name in without_parent(self._items) if name in set(names)]
        if broken:
            yield f"questions that depend on one that is not there, which is ignored: {_some(broken)}"


def part_of(pixels: UInt8[np.ndarray, "h w 3"], number: int, copies: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns one image of a grid of 2 x 2, counted row by row; the whole image if it is no grid."""
    if copies == 1:
        return pixels
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    top, left = number // 2 * height, number % 2 * width
    return pixels[top : top + height, left : left + width]


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
