"""Detectors of the 80 classes, behind one Protocol: what a file says, an ONNX network, or one of ``transformers``."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from arrag_jax.errors import UserError
from arrag_jax.evaluation.geneval.rules import OFFICIAL, Thresholds
from arrag_jax.evaluation.layouts import read_rgb
from arrag_jax.files import sha256_of
from arrag_jax.json_files import parse_json

OFFICIAL_NAME = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"  # of mmdet, which published scores are made with
NUM_CLASSES = 80


@runtime_checkable
class Detector(Protocol):
    """A detector, with the thresholds that fit its scores.

    Attributes:
      thresholds: what counts as a detection.
      from_images: whether it looks at images, so that it can be checked on known ones.
    """

    @property
    def thresholds(self) -> Thresholds: ...

    @property
    def from_images(self) -> bool: ...

    def facts(self) -> dict[str, Any]:
        """Returns what identifies the detector, as JSON values; ``name`` is among them."""
        ...

    def detect(self, path: str, image: UInt8[np.ndarray, "h w 3"] | None) -> list[dict[str, Any]]:
        """Returns the detections of an image: dicts with class, score, box and perhaps color and mask, bool [h, w].

        Args:
          path: of the image file, relative to the folder of the run.
          image: its pixels; None only if the detector is not ``from_images``.
        """
        ...


def read_classes(path: Path) -> list[str]:
    """Returns the names of the classes, one per line, in the order of a detector's outputs.

    Raises:
      UserError: if the file cannot be read, or does not hold 80 different names.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names of {path} ({error}); give --object_names") from None
    if len(names) != NUM_CLASSES or len(set(names)) != NUM_CLASSES:
        raise UserError(f"{path} holds {len(set(names))} different names of classes, and not {NUM_CLASSES}")
    return names


class FileDetections:
    """Detections that another program wrote, one line per image.

    A line is {"filename": path, "detections": [{"class", "score", "box", "mask"?, "color"?}]}. The path ends with that
    of the image in the run's folder. "mask" is the path of an image file, relative to this file, whose pixels are not 0
    inside the object. A line without "filename" describes the detector: {"detector": name, "thresholds": {…}}.
    """

    from_images = False

    def __init__(self, path: Path):
        self._path, self._lines, self._name = path, dict[str, list[dict[str, Any]]](), ""
        self.thresholds = OFFICIAL
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._add(parse_json(line, f"{path}, line {number}"), f"{path}, line {number}")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the detections of {path} ({error}); give another --detector") from None

    def _add(self, line: Any, where: str) -> None:
        if not isinstance(line, dict) or not ("filename" in line or "detector" in line):
            raise UserError(f"{where} has neither filename and detections nor detector")
        if "filename" not in line:
            self._name, held = str(line["detector"]), line.get("thresholds", {})
            try:
                self.thresholds = Thresholds(**held)
            except TypeError as error:
                raise UserError(f"{where}: thresholds are {', '.join(vars(OFFICIAL))} ({error})") from None
            return
        found = line.get("detections")
        if not isinstance(line["filename"], str) or not isinstance(found, list):
            raise UserError(f"{where}: filename must be a text and detections a list")
        if not all(isinstance(each, dict) for each in found):
            raise UserError(f"{where}: a detection must be an object")
        for end in _ends(line["filename"]):
            if end in self._lines and end == _ends(line["filename"])[-1]:
                raise UserError(f"{where}: {line['filename']} has a line already")
            self._lines[end] = found

    def facts(self) -> dict[str, Any]:
        """Returns the name that the file gives, and the file's hash."""
        return {"name": self._name or "file", "sha256": sha256_of(self._path)}

    def detect(self, path: str, image: UInt8[np.ndarray, "h w 3"] | None) -> list[dict[str, Any]]:
        """Returns the detections of the line whose filename ends with ``path``.

        Raises:
          UserError: if there is no such line.
        """
        del image
        if path not in self._lines:
            raise UserError(f"{self._path} has no line for {path}; detect all images of the run")
        return [self._with_mask(each) for each in self._lines[path]]

    def _with_mask(self, detection: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(detection.get("mask"), str):
            return dict(detection)
        return {**detection, "mask": read_mask(self._path.parent / detection["mask"])}


def _ends(path: str) -> list[str]:
    """Returns the ends of a path by which an image may be named: 1 to 4 of its parts."""
    parts = PurePosixPath(path).parts
    return ["/".join(parts[-count:]) for count in range(1, min(4, len(parts)) + 1)]


def read_mask(path: Path) -> Bool[np.ndarray, "h w"]:
    """Returns which pixels of an image file are not black."""
    return read_rgb(path).max(-1) > 0


def crop(image: UInt8[np.ndarray, "h w 3"], detection: Mapping[str, Any]) -> UInt8[np.ndarray, "box_h box_w 3"]:
    """Returns the pixels in a detection's box; where it has a mask, those outside the mask are grey (#999).

    Parts of the box outside of the image are black, and a fraction of a pixel is rounded, as PIL's crop does.
    """
    mask = detection.get("mask")
    if mask is not None:
        if mask.shape != image.shape[:2]:
            raise UserError(f"a mask of {mask.shape} pixels for an image of {image.shape[:2]}; they must be equal")
        image = np.where(mask[..., None], image, np.uint8(0x99))
    left, top, right, bottom = (round(number) for number in detection["box"])
    box = (left, top, max(right, left + 1), max(bottom, top + 1))  # never empty, which no image encoder takes
    return np.asarray(Image.fromarray(image).crop(box))


def without_mask(detection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a detection as a line of JSON holds it."""
    return json.loads(json.dumps({key: value for key, value in detection.items() if key != "mask"}))
