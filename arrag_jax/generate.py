"""Draws prompts, with retrieval and without.

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --prompt "two dogs" --workdir demo

Leaves in --workdir: a picture a prompt and method, ``grid.png`` (prompt, one column a method, same seeds),
``provenance_N.png`` (for each cell of the first method that retrieves, whether its code was retrieved and from which
stored image) and ``provenance.json``.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.data import scenes
from arrag_jax.decode.loop import Drawn
from arrag_jax.errors import UserError
from arrag_jax.evaluation import pictures
from arrag_jax.evaluation.drawing import METHODS, Studio, open_studio
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops.grid import image_and_cell

THUMBNAILS = 5  # stored images shown beside a picture


def run(config: DrawConfig, workdir: str, prompt: list[str], test_prompts: int, method: str, scale: int) -> None:
    """Draws every --prompt with every method (or --method alone), same seeds, into --workdir."""
    prompt = [*prompt, *(scene.caption for scene in scenes.test_prompts(test_prompts))]
    if not prompt:
        raise UserError('nothing to draw; give at least one --prompt "…" or --test_prompts=N')
    studio = open_studio(config, [method] if method else [])
    studio.text(prompt)  # so that a bad prompt is said before anything is drawn
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    seeds = config.seed + np.arange(len(prompt))
    drawn = {name: studio.draw(prompt, name, seeds) for name in studio.methods}
    for name, (images, _) in drawn.items():
        for i, image in enumerate(images):
            save(out / f"{i:02d}_{name}.png", pictures.upscale(image, scale))
    rows = [(text, [drawn[name][0][i] for name in studio.methods]) for i, text in enumerate(prompt)]
    save(out / "grid.png", pictures.labelled_grid(rows, studio.methods, scale))
    retrieving = [name for name in studio.methods if studio.policy(name).uses_retrieval]
    if retrieving:
        write_provenance(out, studio, prompt, *drawn[retrieving[0]])
    print(f"drew {len(prompt)} prompts x {', '.join(studio.methods)}: {out / 'grid.png'}")


def write_provenance(out: Path, studio: Studio, prompts: list[str], images: np.ndarray, drawn: Drawn) -> None:
    """A provenance picture a prompt, and ``provenance.json`` with the numbers behind them."""
    height, width = studio.model.grid
    source, _ = image_and_cell(drawn.source, height, width)
    records = []
    for i, text in enumerate(prompts):
        ids, counts = np.unique(source[i][source[i] >= 0], return_counts=True)
        top = [int(image) for image in ids[np.argsort(-counts, kind="stable")][:THUMBNAILS]]
        thumbnails = {image: stored_picture(studio, image) for image in top}
        shape = (height, width)
        page = pictures.provenance(images[i], (source[i] >= 0).reshape(shape), source[i].reshape(shape), thumbnails)
        save(out / f"provenance_{i:02d}.png", page)
        moved = drawn.log_p[i] - drawn.log_p_model[i]
        records.append(
            {
                "prompt": text,
                "share_retrieved": round(float((source[i] >= 0).mean()), 4),
                "sources": {studio.store.sources[image]: int((source[i] == image).sum()) for image in top},
                "cells": [
                    {"code": int(c), "rank": int(r), "source": int(s), "log_p_moved": round(float(m), 4)}
                    for c, r, s, m in zip(drawn.codes[i], drawn.rank[i], source[i], moved, strict=True)
                ],
            }
        )
    (out / "provenance.json").write_text(json.dumps(records, indent=1) + "\n")


def stored_picture(studio: Studio, image: int) -> np.ndarray:
    """A stored image, decoded from its codes (a store keeps no pixels)."""
    codes = studio.store.codes[image].reshape(1, -1).astype(np.int32)
    return np.asarray(to_uint8(studio.model.decode_codes(codes, *studio.model.grid)))[0]


def save(path: Path, image: np.ndarray) -> None:
    """Writes a PNG."""
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        workdir=Flag("folder for the pictures; made when absent", "pictures"),
        prompt=Flag("what to draw; give it once or several times", ()),
        test_prompts=Flag("draw the first N captions of the test split of emoji_scenes as well", 0),
        method=Flag(f"one of {', '.join(METHODS)}; default: all that the models can do, side by side", ""),
        scale=Flag("how many times a picture is enlarged", 3),
    )
