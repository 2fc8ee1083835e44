"""The benchmark ``geneval``: detections of every image, colours of some, verdicts, and tag scores with intervals."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from arrag_jax.command import Flag
from arrag_jax.errors import UserError
from arrag_jax.evaluation.geneval import known
from arrag_jax.evaluation.geneval.colors import Clip, Colors
from arrag_jax.evaluation.geneval.detectors import (
    OFFICIAL_NAME,
    Detector,
    FileDetections,
    crop,
    read_classes,
    without_mask,
)
from arrag_jax.evaluation.geneval.mask2former import Mask2Former
from arrag_jax.evaluation.geneval.rules import (
    OFFICIAL,
    TAGS,
    Thresholds,
    asked_colors,
    judge,
    kept,
    require_line,
)
from arrag_jax.evaluation.geneval.yolox import Yolox
from arrag_jax.evaluation.layouts import GenEvalFolders, read_rgb
from arrag_jax.evaluation.line_log import IMAGE, continued, image_hash
from arrag_jax.evaluation.measurements import figure_of
from arrag_jax.files import atomic_write
from arrag_jax.interfaces import Figure, ImageFile, Measurement, Prompt
from arrag_jax.json_files import parse_json

DETECTIONS, RESULTS = "detections.jsonl", "results.jsonl"
COPIES = 4
LEAST = 0.5  # share of single objects below which the detector or the folder is probably wrong


class GenEval:
    """A ``FolderBenchmark`` over the lines of GenEval's evaluation_metadata.jsonl.

    Raises:
      UserError: if a line is no prompt's metadata.
    """

    flags: ClassVar = {
        "detector": Flag("what finds objects: file:PATH, onnx:PATH or mask2former:FOLDER (docs/benchmarks.md)", ""),
        "clip": Flag("folder of a CLIP; empty: what needs it is not scored", "", path=True),
        "object_names": Flag(
            "file of the 80 class names in the order of the detector's outputs: GenEval's object_names.txt",
            "",
            path=True,
        ),
        "threshold": Flag("score that a detection must exceed; negative = the detector's own", -1.0),
        "counting_threshold": Flag("the same for prompts that count", -1.0),
        "check_detector": Flag("refuse a detector that fails on known images", True),
    }

    def __init__(
        self,
        prompts: Sequence[Prompt],
        copies: int,
        detector: str,
        clip: str,
        object_names: str,
        threshold: float,
        counting_threshold: float,
        check_detector: bool,
    ):
        self.prompts, self.copies, self.layout = prompts, copies or COPIES, GenEvalFolders()
        self._given, self._clip, self._check = detector, clip, check_detector
        self._names = object_names
        self._limits = {"score": threshold, "counting": counting_threshold}
        self._lines: dict[str, dict[str, Any]] = {}
        for prompt in prompts:
            where = f"prompt {prompt.name}"
            if not prompt.line:
                raise UserError("geneval needs GenEval's own evaluation_metadata.jsonl as --prompts")
            self._lines[prompt.name] = parse_json(prompt.line, where)
            require_line(self._lines[prompt.name], where)
        self._scorer: _Scorer | None = None

    def protocol(self) -> dict[str, Any]:
        """Opens the detector and CLIP, and returns what identifies them, with the thresholds."""
        if not self._given:
            raise UserError("geneval needs a detector; give --detector, or --draw_only to draw alone")
        detector = open_detector(self._given, self._names)
        given = {name: value for name, value in self._limits.items() if value >= 0}
        thresholds = Thresholds(**{**vars(detector.thresholds), **given})
        if self._check and detector.from_images:
            known.check(detector)
        colors = Colors(Clip(self._clip)) if self._clip else None
        facts = {
            "detector": detector.facts(),
            "thresholds": dict(vars(thresholds)),
            "clip": colors.encoder.facts() if colors else None,
        }
        self._scorer = _Scorer(detector, thresholds, colors, facts)
        return facts

    def measure(self, folder: Path, images: Sequence[ImageFile], engine: Any = None) -> Measurement:
        """Writes detections.jsonl, image by image, and results.jsonl; returns tag scores, overall and shares."""
        scorer = self._scorer
        assert scorer is not None  # ``protocol`` is called first
        name = scorer.facts["detector"]["name"]
        header = {"detector": name, "thresholds": scorer.facts["thresholds"], "made_with": scorer.facts}
        keys = [
            {"filename": image.path, IMAGE: image_hash(folder / image.path), "line": image.prompt.line}
            for image in images
        ]

        def detected(numbers: list[int]) -> Iterator[dict[str, Any]]:
            return scorer.detected(folder, [images[i] for i in numbers], self._lines)

        entries = continued(folder / DETECTIONS, header, keys, detected, "detecting")
        verdicts = [
            judge(self._lines[image.prompt.name], entry["detections"], scorer.thresholds)
            for image, entry in zip(images, entries, strict=True)
        ]
        with atomic_write(folder / RESULTS) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for image, verdict in zip(images, verdicts, strict=True):
                if verdict["correct"] is not None:
                    file.write(json.dumps(_line(image, self._lines[image.prompt.name], verdict)) + "\n")
        names = [image.prompt.name for image in images]
        figures, values, unread = self._figures(names, [verdict["correct"] for verdict in verdicts])
        return Measurement(figures, values, tuple(_notes(scorer, figures, unread)))

    def _figures(
        self, names: Sequence[str], verdicts: Sequence[bool | None]
    ) -> tuple[dict[str, Figure], dict[str, dict[str, tuple[float, float]]], list[str]]:
        """Returns figures, values and the tags that are not scored, from one prompt and one verdict per image."""
        groups: dict[str, list[bool | None]] = {}
        for name, correct in zip(names, verdicts, strict=True):
            groups.setdefault(name, []).append(correct)
        unread = sorted({self._lines[name]["tag"] for name, group in groups.items() if None in group})
        values: dict[str, dict[str, tuple[float, float]]] = {tag: {} for tag in TAGS}
        values |= {"images": {}, "prompts": {}}
        for name, group in groups.items():
            tag, right = self._lines[name]["tag"], np.array([bool(correct) for correct in group])
            if tag not in unread:
                values[tag][name] = (float(right.mean()), float(len(right)))
                values["images"][name] = (float(right.mean()), float(len(right)))
                values["prompts"][name] = (float(right.any()), 1.0)
        figures = {"overall": figure_of(values, TAGS), **{tag: figure_of(values, [tag]) for tag in TAGS}}
        figures |= {
            "right images": Figure(None) if unread else figure_of(values, ["images"]),
            "prompts with a right image": Figure(None) if unread else figure_of(values, ["prompts"]),
        }
        return figures, values, unread


def open_detector(given: str, object_names: str) -> Detector:
    """Returns the detector that a flag names: file:PATH, onnx:PATH or mask2former:FOLDER.

    Args:
      object_names: path of the class names, for a detector that looks at images.

    Raises:
      UserError: if there is no such kind of detector, or one of its files cannot be read.
    """
    kind, _, path = given.partition(":")
    kinds: dict[str, Callable[..., Detector]] = {"onnx": Yolox, "mask2former": Mask2Former}
    if kind == "file" and path:
        return FileDetections(Path(path))
    if kind not in kinds or not path:
        raise UserError(f"--detector={given!r} names none; give file:PATH, onnx:PATH or mask2former:FOLDER")
    if not object_names:
        raise UserError(
            f"--detector={given} needs the names of its classes; give GenEval's object_names.txt as --object_names"
        )
    return kinds[kind](Path(path), read_classes(Path(object_names)))


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """The opened detector, its thresholds, what reads colours (None = nothing), and what identifies all of them."""

    detector: Detector
    thresholds: Thresholds
    colors: Colors | None
    facts: dict[str, Any]

    def detected(
        self, folder: Path, images: Sequence[ImageFile], lines: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yields the detections of some images; colours that verdicts depend on are read for all of them at once."""
        found: list[list[dict[str, Any]]] = []
        asked: list[tuple[str, np.ndarray, Any]] = []
        for image in images:
            pixels = read_rgb(folder / image.path) if self.colors or self.detector.from_images else None
            found.append(self.detector.detect(image.path, pixels))
            if self.colors and pixels is not None:
                counted = kept(lines[image.prompt.name], found[-1], self.thresholds)
                for name, detection in asked_colors(lines[image.prompt.name], counted):
                    asked.append((name, crop(pixels, detection), detection))
        if self.colors:
            colors = self.colors([pixels for _, pixels, _ in asked], [name for name, _, _ in asked])
            for (_, _, detection), color in zip(asked, colors, strict=True):
                detection["color"] = color
        for detections in found:
            yield {"detections": [without_mask(each) for each in detections]}


def _notes(scorer: _Scorer, figures: Mapping[str, Figure], unread: Sequence[str]) -> Iterator[str]:
    name, single = scorer.facts["detector"]["name"], figures["single_object"].value
    if name != OFFICIAL_NAME or scorer.thresholds != OFFICIAL:
        limits = f"thresholds {scorer.thresholds.score:g} and {scorer.thresholds.counting:g} for counting"
        yield f"not comparable with published GenEval: the detector is {name}, with {limits}"
    if unread:
        yield f"{', '.join(unread)}: not scored, because no colours were read; give --clip"
    if single is not None and single < LEAST:
        yield (
            f"single_object is {single:.0%}: below {LEAST:.0%} the weights that drew the images, the detector or its "
            "thresholds are probably wrong"
        )


def _line(image: ImageFile, line: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of results.jsonl, as the official summary reads it."""
    return {
        "filename": image.path,
        "tag": line["tag"],
        "prompt": line["prompt"],
        "correct": verdict["correct"],
        "reason": verdict["reason"],
        "metadata": json.dumps(line),
        "details": json.dumps(verdict["kept"]),
    }
