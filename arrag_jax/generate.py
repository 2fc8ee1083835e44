"""Draws prompts, with retrieval and without.

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --prompt "two dogs" --workdir demo

Leaves in --workdir: a picture a prompt and method, and ``grid.png`` (prompt, one column a method, same seeds). For
every method that retrieves also, unless --noprovenance, ``provenance_NN_METHOD.png`` (from which stored image each
cell's code came, and how far that moved the draw) and ``provenance.json`` (the same in numbers, and a copy audit; its
keys are those of ``evaluation.provenance.write_pages``).
"""

from pathlib import Path

import jax
import numpy as np
from PIL import Image

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.data import scenes
from arrag_jax.errors import UserError
from arrag_jax.evaluation.canvas import upscale
from arrag_jax.evaluation.drawing import METHODS, open_studio
from arrag_jax.evaluation.pictures import labelled_grid
from arrag_jax.evaluation.provenance import summary, write_pages
from arrag_jax.files import write_json
from arrag_jax.mesh import start_distributed


def run(
    config: DrawConfig,
    workdir: str,
    prompt: list[str],
    test_prompts: int,
    method: str,
    scale: int,
    provenance: bool = True,
) -> None:
    """Draws every --prompt with every method (or --method alone), same seeds, into --workdir."""
    start_distributed()
    if scale < 1:
        raise UserError(f"--scale={scale} must be at least 1")
    prompt = [*prompt, *(scene.caption for scene in scenes.test_prompts(test_prompts))]
    if not prompt:
        raise UserError('nothing to draw; give at least one --prompt "…" or --test_prompts=N')
    studio = open_studio(config, [method] if method else [])
    studio.text(prompt)  # so that a bad prompt is said before anything is drawn
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    seeds = config.seed + np.arange(len(prompt))
    drawn = {name: studio.draw(prompt, name, seeds) for name in studio.methods}
    if jax.process_index() > 0:  # all have the pictures, one writes them
        return
    for name, (images, _) in drawn.items():
        for i, image in enumerate(images):
            save(out / f"{i:02d}_{name}.png", upscale(image, scale))
    rows = [(text, [drawn[name][0][i] for name in studio.methods]) for i, text in enumerate(prompt)]
    save(out / "grid.png", labelled_grid(rows, studio.methods, scale))
    records = []
    for name in studio.methods:
        if provenance and studio.policy(name).uses_retrieval:
            pages = write_pages(out, studio, name, prompt, *drawn[name])
            print(f"{name}: {summary(pages)}")
            records += pages
    if records:
        write_json(out / "provenance.json", records)
    print(f"drew {len(prompt)} prompts x {', '.join(studio.methods)}: {out / 'grid.png'}")


def save(path: Path, image: np.ndarray) -> None:
    """Writes a PNG."""
    Image.fromarray(image).save(path)


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        workdir=Flag("folder for the pictures; made when absent", "pictures", path=True),
        prompt=Flag("what to draw; give it once or several times", ()),
        test_prompts=Flag("draw the first N captions of the test split of emoji_scenes as well", 0),
        method=Flag(f"one of {', '.join(METHODS)}; default: all that the models can do, side by side", ""),
        scale=Flag("how many times a picture is enlarged", 3),
        provenance=Flag("of methods that retrieve, write where the codes came from, and how much is copied", True),
    )
