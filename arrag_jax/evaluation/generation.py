"""Draws prompts into a folder: what ``generate`` does."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from arrag_jax import progress, signals
from arrag_jax.config import DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.benchmarks import prompts_of
from arrag_jax.evaluation.pipeline import Batch, Pipeline, open_pipeline
from arrag_jax.evaluation.provenance import page_and_record, summary
from arrag_jax.evaluation.run_folder import GRID, RunFolder, settings_of, texts_of
from arrag_jax.figures.canvas import upscale
from arrag_jax.figures.grids import labelled_grid
from arrag_jax.files import exclusive_lock

AUTO, SIDE = "auto", 144  # pixels: the side towards which small pictures are enlarged
GRID_ROWS = 64  # prompts in grid.png, the first ones: it is held in memory, and a longer one is hard to look at


def generate(
    config: DrawConfig,
    workdir: str,
    prompt: Sequence[str],
    num_test_prompts: int,
    method: str,
    scale: int | str,
    provenance: bool = True,
) -> None:
    """Draws prompts with every method (or ``method`` alone), same seeds, into a folder; goes on where it was.

    Args:
      num_test_prompts: how many prompts of the config's data set are drawn after the others.
      scale: how many times images are enlarged; ``AUTO``: to about ``SIDE`` pixels.

    Raises:
      UserError: a scale below 1, no prompt or a bad one, or as ``open_pipeline`` and ``RunFolder``.
    """
    if scale != AUTO and not (str(scale).isdecimal() and int(scale) >= 1):
        raise UserError(f"--scale={scale} must be at least 1, or {AUTO}")
    prompt = [*prompt, *prompts_of(config.data, num_test_prompts)]
    if not prompt:
        raise UserError('nothing to draw; give at least one --prompt "…" or --test_prompts=N')
    pipeline = open_pipeline(config, [method] if method else [])
    scale = max(1, SIDE // max(pipeline.model.image_size)) if scale == AUTO else int(scale)
    pipeline.text.length(prompt)  # so that a bad prompt is said before anything is drawn
    names = [name_of(i, name) for name in pipeline.methods for i in range(len(prompt))]
    if jax.process_index() > 0:  # all draw, one writes
        draw_missing(pipeline, prompt, missing_for_all(None, len(names)), None)
        return
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(out, settings_of(pipeline, prompt, scale, provenance), names)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive_lock(out))
        whole = folder.begin()
        missing = missing_for_all(np.array([name not in whole for name in names]), len(names))
        if folder.earlier:
            progress.tell(f"{out} held pictures of another run ({', '.join(folder.earlier)} differ); they are replaced")
        elif whole and missing.any():
            progress.tell(f"continuing: {len(whole)} of {len(names)} pictures are drawn already")
        draw_missing(pipeline, prompt, missing, folder)
        if not folder.complete:
            finish(pipeline, prompt, folder)
        what = "nothing to do: there are" if folder.complete else "drew"
        print(f"{what} {len(prompt)} prompts x {', '.join(pipeline.methods)}: {out / GRID}")


def name_of(number: int, method: str) -> str:
    """Returns the name of a prompt's picture by a method."""
    return f"{number:02d}_{method}"


def missing_for_all(missing: np.ndarray | None, count: int) -> np.ndarray:
    """Returns in every process of the run what the first one knows: which of ``count`` pictures are missing.

    The others give None.
    """
    known = np.zeros(count, np.int64) if missing is None else missing.astype(np.int64)
    return known.astype(bool) if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(known).astype(bool)


def draw_missing(pipeline: Pipeline, prompts: list[str], missing: np.ndarray, folder: RunFolder | None) -> None:
    """Draws the pictures that are missing and writes them into the folder (None: another process does), in batches.

    Raises:
      signals.Stop: after the batch in which a signal comes.
    """
    seeds, steps = pipeline.config.seed + np.arange(len(prompts)), itertools.count(1)
    with signals.held("batch") as point:
        for name, wanted in zip(pipeline.methods, missing.reshape(-1, len(prompts)), strict=True):
            for batch in pipeline.draw(prompts, name, seeds, wanted):
                if folder is not None:
                    write(pipeline, prompts, name, batch, wanted, folder)
                point.check(next(steps))


def write(
    pipeline: Pipeline, prompts: list[str], method: str, batch: Batch, wanted: np.ndarray, folder: RunFolder
) -> None:
    """Writes the wanted pictures of a batch, with their pages where they were retrieved."""
    settings = folder.settings
    told = settings["provenance"] and pipeline.policy(method).uses_retrieval
    for place, number in enumerate(batch.numbers.tolist()):
        if wanted[number]:
            image, drawn = batch.images[place], jax.tree.map(lambda x, place=place: x[place], batch.drawn)
            page, record = page_and_record(pipeline, method, prompts[number], image, drawn) if told else (None, None)
            texts = texts_of(settings, number, method)
            folder.add(name_of(number, method), upscale(image, settings["scale"]), texts, page, record)


def finish(pipeline: Pipeline, prompts: list[str], folder: RunFolder) -> None:
    """Writes the grid of the first pictures and the records of all, and prints the methods' shares."""
    rows = [
        (text, [folder.picture(name_of(i, method)) for method in pipeline.methods])
        for i, text in enumerate(prompts[:GRID_ROWS])
    ]
    shares: dict[str, list[dict[str, float]]] = {}
    for record in folder.records():
        kept = {key: value for key, value in record.items() if key.startswith("share_")}
        shares.setdefault(record["method"], []).append(kept)
    folder.finish(labelled_grid(rows, pipeline.methods, folder.settings["scale"]))
    for method, records in shares.items():
        print(f"{method}: {summary(records)}")
