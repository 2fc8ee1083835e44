"""GenEval's rules: whether the objects that a detector found in an image are those of its prompt; pure functions.

Source: GenEval (Ghosh et al., NeurIPS 2023) and its official ``evaluate_images.py``, whose verdicts these functions
give, down to the order of ties. A detection is a dict with ``class``, ``score``, ``box`` (left, top, right, bottom in
pixels) and, where it is asked for, ``color``: one of ``COLORS``, or None where no colours were read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from arrag_jax.errors import UserError
from arrag_jax.fields import Settings
from arrag_jax.parsing import in_range

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOR_TAGS = ("colors", "color_attr")
COUNTING = "counting"
SMALLEST_OFFSET = 1e-3  # of centres, less the objects' share; below it there is no relation
SMALLEST_SHARE = 0.5  # of an axis in the direction from one centre to the other
Detection = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Thresholds(Settings):
    """What counts as a detection; the defaults belong to GenEval's own detector."""

    score: float = 0.3  # a detection must have a higher score
    counting: float = 0.9  # the same for prompts that count
    most: int = 16  # detections per class
    overlap: float = 1.0  # IoU from which the weaker one of two detections of a class is dropped; 1 = none is
    position: float = 0.1  # share of both objects' sizes that their centres must be further apart

    def __post_init__(self):
        for name in ("score", "counting", "overlap", "position"):
            in_range(name, getattr(self, name), 0.0, 1.0)
        in_range("most", self.most, 1, float("inf"))

    def of_tag(self, tag: str) -> float:
        """Returns the score that detections of a prompt with this tag must exceed."""
        return self.counting if tag == COUNTING else self.score


OFFICIAL = Thresholds()


def judge(
    line: Mapping[str, Any], detections: Sequence[Detection], thresholds: Thresholds = OFFICIAL
) -> dict[str, Any]:
    """Returns the verdict on one image.

    Args:
      line: the prompt's metadata: ``tag``, ``include`` and perhaps ``exclude``, as in evaluation_metadata.jsonl.
      detections: everything that the detector found, in its own order.
      thresholds: the detector's.

    Returns:
      ``correct``: whether the image shows the prompt; None if that depends on colours that were not read.
      ``reason``: what is wrong, one line each. ``kept``: class → the detections that count, best first, each as
      [left, top, right, bottom, score].

    Raises:
      UserError: if the line or a detection is not one.
    """
    require_line(line)
    found = kept(line, detections, thresholds)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    unread = False
    for wanted in line["include"]:
        name, count = wanted["class"], wanted["count"]
        best, problem = found.get(name, [])[:count], ""
        if len(best) < count:
            problem = f"expected {name}>={count}, found {len(best)}"
        elif "color" in wanted:
            colors = [each.get("color") for each in best]
            unread |= None in colors
            problem = _wrong_color(wanted, [str(color) for color in colors if color is not None])
            problem = "" if None in colors else problem
        if not problem and "position" in wanted:
            relation, target = wanted["position"]
            problem = _wrong_position(name, relation, best, groups[target], thresholds.position)
        if problem:
            reasons.append(problem)
        groups.append(None if problem else best)
    for wanted in line.get("exclude", []):
        name, count = wanted["class"], wanted["count"]
        if len(found.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(found[name])}")
    boxes = {name: [[*each["box"], each["score"]] for each in group] for name, group in found.items()}
    correct = None if unread and not reasons else not reasons
    return {"correct": correct, "reason": "\n".join(reasons), "kept": boxes}


def kept(
    line: Mapping[str, Any], detections: Sequence[Detection], thresholds: Thresholds = OFFICIAL
) -> dict[str, list[Detection]]:
    """Returns the detections that count for a prompt, by class, best first; classes without any are left out.

    Raises:
      UserError: if a detection has no class, score or box of four numbers.
    """
    classes: dict[str, list[Detection]] = {}
    for each in detections:
        classes.setdefault(_checked(each)["class"], []).append(each)
    found = {}
    for name, group in classes.items():
        scores = np.array([each["score"] for each in group])
        order = np.argsort(scores)[::-1]  # of equal scores the last one comes first, as in the official code
        order = order[scores[order] > thresholds.of_tag(line["tag"])][: thresholds.most]
        strong = _without_overlaps([group[place] for place in order], thresholds.overlap)
        if strong:
            found[name] = strong
    return found


def asked_colors(line: Mapping[str, Any], found: Mapping[str, Sequence[Detection]]) -> list[tuple[str, Detection]]:
    """Returns the detections whose colours the verdict depends on, with their classes, of those that ``kept`` gives."""
    return [
        (wanted["class"], each)
        for wanted in line["include"]
        if "color" in wanted and len(found.get(wanted["class"], [])) >= wanted["count"]
        for each in found[wanted["class"]][: wanted["count"]]
    ]


def relations(
    box: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"], position: float = OFFICIAL.position
) -> tuple[str, ...]:
    """Returns the relations of one box to another, of ``RELATIONS``; none, one or two hold."""
    corners = np.stack([box, other]).reshape(2, 2, 2)  # [box, corner, axis]
    centers, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    reduced = np.maximum(np.abs(offset) - position * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(reduced) < SMALLEST_OFFSET).all():
        return ()
    x, y = reduced / np.linalg.norm(offset)
    holds = (x < -SMALLEST_SHARE, x > SMALLEST_SHARE, y < -SMALLEST_SHARE, y > SMALLEST_SHARE)
    return tuple(name for name, it_holds in zip(RELATIONS, holds, strict=True) if it_holds)


def iou(box: Sequence[int | float], other: Sequence[int | float]) -> float:
    """Returns the intersection of two boxes over their union, where a box from x to x is one pixel wide."""
    a, b = np.array(box, float), np.array(other, float)
    shared = np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])])
    area, other_area, both = (np.maximum(x[2:] - x[:2] + 1, 0).prod() for x in (a, b, shared))
    union = area + other_area - both
    return float(both / union) if union else 0.0


def require_line(line: Mapping[str, Any], where: str = "a metadata line") -> None:
    """Raises UserError unless ``line`` is a prompt's metadata.

    Args:
      where: name of the line in the message.
    """
    if line.get("tag") not in TAGS:
        raise UserError(f"{where}: tag {line.get('tag')!r} is none of GenEval's ({', '.join(TAGS)})")
    if not isinstance(line.get("include"), list) or not isinstance(line.get("exclude", []), list):
        raise UserError(f"{where}: include and exclude must be lists of objects")
    for place, wanted in enumerate([*line["include"], *line.get("exclude", [])]):
        number = isinstance(wanted, Mapping) and wanted.get("count")
        if not isinstance(wanted, Mapping) or type(number) is not int or number < 1:
            raise UserError(f"{where}: {wanted!r} is no object with a class and a count of at least 1")
        if not isinstance(wanted.get("class"), str):
            raise UserError(f"{where}: {wanted!r} is no object with a class and a count of at least 1")
        if "color" in wanted and wanted["color"] not in COLORS:
            raise UserError(f"{where}: color {wanted['color']!r} is none of {', '.join(COLORS)}")
        if "position" in wanted:
            _require_position(wanted["position"], place, where)


def _require_position(position: Any, place: int, where: str) -> None:
    is_pair = isinstance(position, list | tuple) and len(position) == 2
    if not is_pair or position[0] not in RELATIONS or position[1] not in range(place):
        raise UserError(f"{where}: position {position!r} is no relation and number of an earlier object")


def _checked(detection: Detection) -> Detection:
    try:
        numbers = [float(number) for number in (*detection["box"], detection["score"])]
        if len(numbers) == 5 and np.isfinite(numbers).all() and isinstance(detection["class"], str):
            return detection
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{str(detection)[:200]} is no detection; it needs class, score and box (left, top, right, bottom)")


def _without_overlaps(group: Sequence[Detection], overlap: float) -> list[Detection]:
    """Returns detections of one class, best first, without those that overlap a better one."""
    strong: list[Detection] = []
    for each in group:
        if overlap == 1 or all(iou(better["box"], each["box"]) < overlap for better in strong):
            strong.append(each)
    return strong


def _wrong_color(wanted: Mapping[str, Any], colors: list[str]) -> str:
    """Returns what is wrong with the colours of the objects; "" if enough have the right one."""
    color, right = wanted["color"], colors.count(wanted["color"])
    if right >= wanted["count"]:
        return ""
    seen = ", ".join(f"{colors.count(each)} {each}" for each in COLORS if each in colors)
    return f"expected {color} {wanted['class']}>={wanted['count']}, found {right} {color}; and {seen}"


def _wrong_position(
    name: str, relation: str, best: Sequence[Detection], targets: Sequence[Detection] | None, position: float
) -> str:
    """Returns what is wrong with the relation of every object to every target; "" if all have it."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for each in best:
        for target in targets:
            holds = relations(np.array(each["box"], float), np.array(target["box"], float), position)
            if relation not in holds:
                return f"expected {name} {relation} target, found {' and '.join(holds)} target"
    return ""
