"""Mask2Former by ``transformers`` as a detector, post-processed as mmdet does it for GenEval.

The weights that ``transformers`` reads are Meta's (Mask2Former, Swin, COCO instances), not mmdet's, so scores are not
those of GenEval's own detector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from arrag_jax.errors import UserError
from arrag_jax.evaluation.geneval.detectors import NUM_CLASSES
from arrag_jax.evaluation.geneval.rules import Thresholds
from arrag_jax.evaluation.pretrained import folder_hashes, pretrained

MOST = 100  # (query, class) pairs that are kept


class Mask2Former:
    """A ``Detector``.

    Raises:
      UserError: if torch or transformers is missing, or the folder holds no such model of 80 classes.
    """

    from_images = True
    thresholds = Thresholds()

    def __init__(self, folder: Path, classes: Sequence[str]):
        self._torch, self._prepare, self._model = pretrained(
            folder,
            "AutoImageProcessor",
            "Mask2FormerForUniversalSegmentation",
            "--detector=mask2former:…",
            "Mask2Former",
        )
        if self._model.config.num_labels != NUM_CLASSES:
            raise UserError(f"{folder} knows {self._model.config.num_labels} classes, and not COCO's {NUM_CLASSES}")
        self._folder, self._classes = folder, list(classes)

    def facts(self) -> dict[str, Any]:
        """Returns the hashes of the folder's files."""
        return {"name": "transformers' Mask2Former, not mmdet's weights", "sha256": folder_hashes(self._folder)}

    def detect(self, path: str, image: UInt8[np.ndarray, "h w 3"] | None) -> list[dict[str, Any]]:
        """Returns the detections of an image, best first, with masks."""
        del path
        assert image is not None
        given = self._prepare(images=[image], return_tensors="pt")
        height, width = padded = given["pixel_values"].shape[-2:]
        if "pixel_mask" in given:  # what is scaled from the image lies top left, the rest is padding
            height, width = (int(given["pixel_mask"][0].any(axis).sum()) for axis in (1, 0))

        def scaled(masks: Any, size: Any) -> Any:
            return self._torch.nn.functional.interpolate(masks, size=tuple(size), mode="bilinear", align_corners=False)

        with self._torch.no_grad():
            out = self._model(**given)
            masks = scaled(out.masks_queries_logits, padded)[..., :height, :width]
            masks = scaled(masks, image.shape[:2])[0]
        return instances(out.class_queries_logits[0].double().numpy(), masks.double().numpy(), self._classes)


def instances(
    logits: Float[np.ndarray, "Q classes"], masks: Float[np.ndarray, "Q h w"], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns detections from a query-based segmentation, best first.

    The ``MOST`` most probable (query, class) pairs are kept; a score is that probability times the mean sigmoid inside
    the mask. A box reaches from the mask's first pixel to one beyond its last. Queries with an empty mask are dropped.

    Args:
      logits: of the classes and, last, of no object.
      masks: logits of each query's mask, in the image's pixels.
    """
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    chances = (shifted / shifted.sum(-1, keepdims=True))[:, :-1]
    order = np.argsort(-chances, axis=None, kind="stable")[:MOST]
    found = []
    for query, number in zip(*np.unravel_index(order, chances.shape), strict=True):
        mask = masks[query] > 0
        if not mask.any():
            continue
        inside = float((1 / (1 + np.exp(-masks[query][mask]))).mean())
        (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
        box = [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
        score = float(chances[query, number]) * inside
        found.append({"class": classes[number], "score": score, "box": box, "mask": mask})
    return sorted(found, key=lambda each: -each["score"])
