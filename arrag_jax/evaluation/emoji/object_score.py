"""Object score of pictures of ``emoji_scenes``: does a picture show what its caption says, by GenEval's rules?

GenEval (Ghosh et al., NeurIPS 2023), here with an exact detector. Sprites that the caption does not name are not
held against a picture, except that counting is strict. Where no colour is named, any colour of the class counts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from arrag_jax.data.emoji.scenes import FAMILIES, Scene, relations
from arrag_jax.errors import UserError
from arrag_jax.evaluation.emoji.detector import Detection, detect


def object_score(pictures: UInt8[np.ndarray, "B 48 48 3"], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Scores each picture against the scene that its prompt came from.

    Returns:
      ``right``: bool[B], one verdict a picture; ``families``: the mean of each family that occurs;
      ``overall``: the mean of those means, GenEval's overall score when all six occur.

    Raises:
      UserError: no pictures, or not one scene a picture.
    """
    right = verdicts(pictures, scenes)
    return {"right": right, **family_scores(right, scenes)}


def verdicts(pictures: UInt8[np.ndarray, "B 48 48 3"], scenes: Sequence[Scene]) -> Bool[np.ndarray, " B"]:
    """Returns for each picture whether it shows what its scene's caption says.

    Raises:
      UserError: no pictures, or not one scene a picture.
    """
    if not len(pictures) or len(pictures) != len(scenes):
        raise UserError(
            f"{len(pictures)} pictures against {len(scenes)} scenes; give one scene a picture, at least one"
        )
    return np.array([is_right(found, scene) for found, scene in zip(detect(pictures), scenes, strict=True)])


def family_scores(right: Bool[np.ndarray, " B"], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Returns "families" and "overall" of ``object_score`` from one verdict for each scene."""
    families = np.array([scene.family for scene in scenes])
    means = {family: float(right[families == family].mean()) for family in FAMILIES if family in families}
    return {"families": means, "overall": float(np.mean(list(means.values())))}


def is_right(found: Sequence[Detection], scene: Scene) -> bool:
    """Do the detections of a picture, best first, satisfy the caption of a scene?"""
    if scene.family == "counting":
        name = scene.sprites[0].name
        return sum(detection.name == name for detection in found) == len(scene.sprites)
    best: list[Any] = [
        next((d for d in found if d.name == sprite.name and sprite.colour in (None, d.colour)), None)
        for sprite in scene.sprites
    ]
    if None in best:
        return False
    # As GenEval does, the relation is asked of the best detection of each class.
    return scene.relation is None or scene.relation in relations(best[0].box, best[1].box)
