"""Draws the picture of docs/parts.md: scenes of which a part is filled, and a photo that is extended.

python benchmarks/parts_picture.py --store=demo/store [--photos=FILE.tar] [--out=docs/pictures/parts.png]

Upper part: the first test scenes whose pair of classes training never showed; one of the two sprites is hidden and
filled with the scene's own caption, plain and by DAiD with two-sided keys over the 64 scenes of the store of `arrag
demo` whose captions are nearest (method "caption"), seeds 0 to 2, without selection. Lower part, with --photos: a store
of the tar's first 1,000 photos is built with the embedded tokenizer, and its last photo is extended to the right, plain
and by DAiD with that store. The embedded prior knows no photos.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

from arrag_jax.config import (
    CaptionConfig,
    DaidConfig,
    DatastoreConfig,
    DrawConfig,
    MeshConfig,
    RetrievalConfig,
    SamplingConfig,
)
from arrag_jax.data.emoji.scenes import render, test_prompts
from arrag_jax.data.registry import open_images
from arrag_jax.evaluation.parts import draw, part_of
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures.grids import labelled_grid, save
from arrag_jax.retrieval.build import build

MODEL = str(Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus")
STORE = flags.DEFINE_string("store", None, "folder of a datastore with codebook keys", required=True)
PHOTOS = flags.DEFINE_string("photos", "", "tar of photos")
OUT = flags.DEFINE_string("out", "docs/pictures/parts.png", "the picture")
SCENES = flags.DEFINE_integer("scenes", 2, "scenes that are filled")
WEIGHT = flags.DEFINE_float("weight", 0.5, "λ for scenes")
TAU = flags.DEFINE_float("tau", 0.003, "τ for scenes")
SEEDS = np.arange(3)


def main(_: list[str]) -> None:
    """Writes the picture."""
    images = [_filled()]
    save(Path(OUT.value), images[0])  # before the minutes that the photos take
    if PHOTOS.value:
        images.append(_extended())
        width = max(image.shape[1] for image in images)
        wide = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in images]
        save(Path(OUT.value), np.concatenate(wide))


def _pipeline(store, method, weight, temperature):
    mixture = DaidConfig(weight, temperature, "sum")
    config = DrawConfig(
        MODEL, RetrievalConfig(store, 128, two_sided=True), daid=mixture, caption=CaptionConfig(64, daid=mixture),
        sampling=SamplingConfig(1.5, top_p=0.9), mesh=MeshConfig(1, 1),
    )  # fmt: skip
    return open_pipeline(config, ("plain", method))


def _drawn(pipeline, part, prompt, method, seeds):
    return [x for batch in draw(pipeline, part, [prompt] * len(seeds), method, seeds) for x in batch.images]


def _filled():
    pipeline, rows = _pipeline(STORE.value, "caption", WEIGHT.value, TAU.value), []
    scenes = (x for x in test_prompts(10_000) if x.held_out and len(x.sprites) == 2)
    for scene in itertools.islice(scenes, SCENES.value):
        left, top, right, bottom = scene.sprites[1].box
        mask = np.zeros((48, 48), bool)
        mask[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = True
        part = part_of(pipeline.model, render(scene), mask)
        fillings = [x for method in pipeline.methods for x in _drawn(pipeline, part, scene.caption, method, SEEDS)]
        rows.append((scene.caption, [render(scene), part.shown, *fillings]))
    titles = ["scene", "mask", *(["plain"] * len(SEEDS)), *(["with retrieval"] * len(SEEDS))]
    return labelled_grid(rows, titles, 2)


def _extended():
    with tempfile.TemporaryDirectory() as folder:
        build(DatastoreConfig(MODEL, PHOTOS.value, num_images=1000, indexes=()), Path(folder) / "store")
        pipeline = _pipeline(str(Path(folder) / "store"), "daid", 0.8, 0.3)
        photo = open_images(PHOTOS.value, "train", "data", pipeline.model.image_size)[-1]["image"]
        part = part_of(pipeline.model, photo, side=("right", 48))
        drawn = [_drawn(pipeline, part, "a dog", method, SEEDS[:1])[0] for method in pipeline.methods]
        return labelled_grid(
            [("a photo, extended to the right", [part.shown, *drawn])], ["photo", "plain", "photos stored"], 2
        )


if __name__ == "__main__":
    app.run(main)
