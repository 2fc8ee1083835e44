"""A detector of the YOLOX form in an ONNX file, run by onnxruntime.

The network takes BGR values from 0 to 255, letterboxed with grey 114 to its input size, top left. Each output row holds
centre, log size, objectness and 80 class probabilities of a cell of the grids of strides 8, 16 and 32, which are
decoded here. The score is objectness x class probability. Source: YOLOX (Ge et al., 2021) and its ONNX demo.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from arrag_jax.errors import UserError
from arrag_jax.evaluation.geneval.detectors import NUM_CLASSES
from arrag_jax.evaluation.geneval.rules import Thresholds
from arrag_jax.files import sha256_of

STRIDES = (8, 16, 32)
GREY = 114
OVERLAP = 0.45  # IoU above which the weaker one of two boxes of a class is the same object
FLOOR = 0.05  # scores below it are dropped at once


class Yolox:
    """A ``Detector``; its counting threshold is lower than GenEval's, because few of its scores exceed 0.9.

    Raises:
      UserError: if onnxruntime is missing, or the file is no network of this form.
    """

    from_images = True
    thresholds = Thresholds(score=0.3, counting=0.5)

    def __init__(self, path: Path, classes: Sequence[str]):
        try:
            import onnxruntime
        except ImportError:
            raise UserError("--detector=onnx:… needs onnxruntime; pip install 'arrag_jax[eval]'") from None
        self._path, self._classes = path, list(classes)
        if not path.is_file():
            raise UserError(f"--detector: there is no file {path}")
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has exceptions of its own
            raise UserError(
                f"{path} cannot be read as an ONNX network ({' '.join(str(error).split())[:200]})"
            ) from None
        (given, *others), (out, *_) = self._session.get_inputs(), self._session.get_outputs()
        form = given.shape
        if (
            others
            or len(form) != 4
            or form[1] != 3
            or not all(isinstance(side, int) and side % 32 == 0 for side in form[2:])
        ):
            raise UserError(f"{path} is not of the YOLOX form: its input is {form}, and not [1, 3, height, width]")
        self._name, self._size = given.name, (form[2], form[3])
        self._cells = cells(*self._size)
        if list(out.shape[1:]) != [len(self._cells), 5 + NUM_CLASSES]:
            raise UserError(f"{path} is not of the YOLOX form: its output is {out.shape}")

    def facts(self) -> dict[str, Any]:
        """Returns the file's name and hash."""
        return {"name": self._path.name, "sha256": sha256_of(self._path)}

    def detect(self, path: str, image: UInt8[np.ndarray, "h w 3"] | None) -> list[dict[str, Any]]:
        """Returns the detections of an image, best first; boxes are in its pixels."""
        assert image is not None
        planes, ratio = letterbox(image, *self._size)
        (rows,) = self._session.run(None, {self._name: planes[None]})
        boxes, scores = decoded(np.asarray(rows[0], np.float32), self._cells)
        height, width = image.shape[:2]
        found = []
        for number, name in enumerate(self._classes):
            for place in strongest(boxes, scores[:, number]):
                box = np.clip(boxes[place] / ratio, 0, [width, height, width, height])
                score = round(float(scores[place, number]), 4)
                found.append({"class": name, "score": score, "box": [round(float(x), 3) for x in box]})
        return sorted(found, key=lambda each: -each["score"])


def letterbox(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> tuple[Float32[np.ndarray, "3 H W"], float]:
    """Returns the network's input for an image, and the factor by which the image was scaled."""
    ratio = min(height / image.shape[0], width / image.shape[1])
    size = max(1, int(image.shape[1] * ratio)), max(1, int(image.shape[0] * ratio))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    page = np.full((height, width, 3), GREY, np.uint8)
    page[: scaled.shape[0], : scaled.shape[1]] = scaled
    return page[..., ::-1].transpose(2, 0, 1).astype(np.float32), ratio


def cells(height: int, width: int) -> Float32[np.ndarray, "A 3"]:
    """Returns column, row and stride of every cell, in the order of the output's rows."""
    grids = []
    for stride in STRIDES:
        y, x = np.mgrid[: height // stride, : width // stride]
        grids.append(np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)], -1))
    return np.concatenate(grids).astype(np.float32)


def decoded(
    rows: Float32[np.ndarray, "A columns"], grid: Float32[np.ndarray, "A 3"]
) -> tuple[Float32[np.ndarray, "A 4"], Float32[np.ndarray, "A classes"]]:
    """Returns the boxes (left, top, right, bottom) and the scores of the output's rows."""
    stride = grid[:, 2:]
    center, size = (rows[:, :2] + grid[:, :2]) * stride, np.exp(rows[:, 2:4]) * stride
    return np.concatenate([center - size / 2, center + size / 2], 1), rows[:, 4:5] * rows[:, 5:]


def strongest(boxes: Float[np.ndarray, "A 4"], scores: Float[np.ndarray, " A"]) -> list[int]:
    """Returns the rows of one class, best first, without those that overlap a better one by more than ``OVERLAP``."""
    order = np.flatnonzero(scores > FLOOR)
    order, taken = order[np.argsort(-scores[order], kind="stable")], list[int]()
    while len(order):
        best, order = int(order[0]), order[1:]
        taken.append(best)
        shared = np.minimum(boxes[best, 2:], boxes[order, 2:]) - np.maximum(boxes[best, :2], boxes[order, :2])
        both = np.maximum(shared, 0).prod(-1)
        areas = (boxes[order, 2:] - boxes[order, :2]).prod(-1) + (boxes[best, 2:] - boxes[best, :2]).prod()
        order = order[both <= OVERLAP * (areas - both)]
    return taken
