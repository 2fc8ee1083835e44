"""Object score of images for ``emoji_scenes``: whether an image shows what its caption says, by GenEval's rules.

Source: GenEval (Ghosh et al., NeurIPS 2023), here with an exact detector. Sprites that the caption does not name do not
count against an image, except that counting is strict. If the caption names no colour, any colour of the class is
right.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from arrag_jax.data.emoji.scenes import Scene, relations
from arrag_jax.data.emoji.worlds import FAMILIES, STANDARD, World
from arrag_jax.errors import UserError
from arrag_jax.evaluation.emoji.detector import Detection, detect


def object_score(
    pictures: UInt8[np.ndarray, "B 48 48 3"], scenes: Sequence[Scene], world: World = STANDARD
) -> dict[str, Any]:
    """Returns the score of each image against the scene of its prompt.

    Returns:
      ``right``: bool[B], one verdict per image; ``families``: the mean of each family that occurs;
      ``overall``: the mean of these means, which is GenEval's overall score if all six families occur.

    Raises:
      UserError: if there are no images, or not one scene per image.
    """
    right = verdicts(pictures, scenes, world)
    return {"right": right, **family_scores(right, scenes)}


def verdicts(
    pictures: UInt8[np.ndarray, "B 48 48 3"], scenes: Sequence[Scene], world: World = STANDARD
) -> Bool[np.ndarray, " B"]:
    """Returns for each image whether it shows what its scene's caption says; all scenes are of one world.

    Raises:
      UserError: if there are no images, or not one scene per image.
    """
    if not len(pictures) or len(pictures) != len(scenes):
        raise UserError(f"{len(pictures)} images for {len(scenes)} scenes; give one scene per image, at least one")
    return np.array([is_right(found, scene) for found, scene in zip(detect(pictures, world), scenes, strict=True)])


def family_scores(right: Bool[np.ndarray, " B"], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Returns "families" and "overall" of ``object_score`` from one verdict per scene."""
    families = np.array([scene.family for scene in scenes])
    means = {family: float(right[families == family].mean()) for family in FAMILIES if family in families}
    return {"families": means, "overall": float(np.mean(list(means.values())))}


def is_right(found: Sequence[Detection], scene: Scene) -> bool:
    """Returns whether the detections of an image, best first, satisfy the caption of a scene."""
    if scene.family == "counting":
        name = scene.sprites[0].name
        return sum(detection.name == name for detection in found) == len(scene.sprites)
    best: list[Any] = [
        next((d for d in found if d.name == sprite.name and sprite.colour in (None, d.colour)), None)
        for sprite in scene.sprites
    ]
    if None in best:
        return False
    # As in GenEval, only the best detection of each class is checked for the relation.
    return scene.relation is None or scene.relation in relations(best[0].box, best[1].box)
