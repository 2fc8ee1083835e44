"""Generates images from prompts into a folder; the implementation of ``generate``."""

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
from arrag_jax.evaluation.parts import Part, PartOf, draw, open_part
from arrag_jax.evaluation.pipeline import Batch, Pipeline, open_pipeline
from arrag_jax.evaluation.png_provenance import provenance_text
from arrag_jax.evaluation.provenance import page_and_record, stored_columns, summary
from arrag_jax.evaluation.run_folder import GRID, RunFolder, settings_of
from arrag_jax.evaluation.run_record import texts_of
from arrag_jax.figures.canvas import upscale
from arrag_jax.figures.grids import labelled_grid
from arrag_jax.files import exclusive_lock

AUTO, SIDE = "auto", 144  # pixels: small images are enlarged to at most this side
SOURCES = 2  # stored images that grid.png shows per prompt
GRID_ROWS = 64  # grid.png shows only the first prompts, because it is held in memory and must stay readable


def generate(
    config: DrawConfig,
    workdir: str,
    prompt: Sequence[str],
    num_test_prompts: int,
    method: str,
    scale: int | str,
    provenance: bool = True,
    test_group: str = "",
    part_of: PartOf | None = None,
    variations: int = 1,
) -> None:
    """Generates images from prompts into a folder, with all methods of the config or with those of ``method``.

    All methods use the same seeds. If the folder holds an unfinished run with the same settings, that run is continued.

    Args:
      num_test_prompts: how many prompts of the config's data set are added to ``prompt``.
      method: names, separated by commas; "" = all of the config.
      scale: integer factor by which images are enlarged; ``AUTO``: to about ``SIDE`` pixels.
      provenance: also write a provenance page per image, for methods that retrieve.
      test_group: the group of those prompts (``prompts_of``).
      part_of: an image of which a part is drawn; None = whole images are drawn.
      variations: images per prompt and method, each with its own seed.

    Raises:
      UserError: if the scale is below 1, if there is no prompt or an invalid one, or as ``open_pipeline``,
        ``open_part`` and ``RunFolder``.
    """
    if scale != AUTO and not (str(scale).isdecimal() and int(scale) >= 1):
        raise UserError(f"--scale={scale} must be at least 1, or {AUTO}")
    prompt = _repeated([*prompt, *prompts_of(config.data, num_test_prompts, test_group)], variations)
    if part_of is not None:
        part_of.require(config.sampling)
    pipeline = open_pipeline(config, method.split(",") if method else [])
    part = None if part_of is None else open_part(part_of, pipeline.model)
    scale = max(1, SIDE // max(pipeline.model.image_size)) if scale == AUTO else int(scale)
    pipeline.text.length(prompt)  # reports a bad prompt before anything is drawn
    names = [name_of(i, name) for name in pipeline.methods for i in range(len(prompt))]
    if jax.process_index() > 0:  # all processes generate, process 0 writes
        draw_missing(pipeline, prompt, missing_for_all(None, len(names)), None, part)
        return
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(pipeline, prompt, scale, provenance) | ({} if part is None else {"part": part.facts})
    folder = RunFolder(out, settings, names)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive_lock(out))
        whole = folder.begin()
        missing = missing_for_all(np.array([name not in whole for name in names]), len(names))
        if folder.earlier:
            progress.tell(f"{out} held images of another run ({', '.join(folder.earlier)} differ); they are replaced")
        elif whole and missing.any():
            progress.tell(f"continuing: {len(whole)} of {len(names)} images are drawn already")
        draw_missing(pipeline, prompt, missing, folder, part)
        if not folder.complete:
            finish(pipeline, prompt, folder, part)
        what = "nothing to do, all images are there:" if folder.complete else "drew"
        print(f"{what} {len(prompt)} prompts x {', '.join(pipeline.methods)}: {out / GRID}")


def _repeated(prompts: list[str], variations: int) -> list[str]:
    """Returns the prompts, each as often as it is drawn. Raises UserError if nothing would be drawn."""
    if not prompts:
        raise UserError('nothing to draw; give at least one --prompt "…" or --test_prompts=N')
    if variations < 1:
        raise UserError(f"--variations={variations} must be at least 1")
    return [each for each in prompts for _ in range(variations)]


def name_of(number: int, method: str) -> str:
    """Returns the name of the image of a prompt by a method."""
    return f"{number:02d}_{method}"


def missing_for_all(missing: np.ndarray | None, count: int) -> np.ndarray:
    """Returns, in every process of the run, which of ``count`` images are missing.

    Args:
      missing: known by process 0; None in all other processes, which receive it from process 0.
    """
    known = np.zeros(count, np.int64) if missing is None else missing.astype(np.int64)
    return known.astype(bool) if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(known).astype(bool)


def draw_missing(
    pipeline: Pipeline, prompts: list[str], missing: np.ndarray, folder: RunFolder | None, part: Part | None = None
) -> None:
    """Generates the missing images in batches, and writes them to the folder.

    Args:
      missing: one flag per image: all prompts of the first method, then of the next one.
      folder: None = another process writes.
      part: the image of which a part is drawn; None = whole images are drawn.

    Raises:
      signals.Stop: after the batch in which a signal arrives.
    """
    seeds, steps = pipeline.config.seed + np.arange(len(prompts)), itertools.count(1)
    with signals.held("batch") as point:
        for name, wanted in zip(pipeline.methods, missing.reshape(-1, len(prompts)), strict=True):
            given = prompts, name, seeds, wanted
            for batch in pipeline.draw(*given) if part is None else draw(pipeline, part, *given):
                if folder is not None:
                    write(pipeline, prompts, name, batch, wanted, folder, part)
                point.check(next(steps))


def write(
    pipeline: Pipeline,
    prompts: list[str],
    method: str,
    batch: Batch,
    wanted: np.ndarray,
    folder: RunFolder,
    part: Part | None = None,
) -> None:
    """Writes the wanted images of a batch, and their provenance pages if the method retrieves.

    An extended picture has no page, because it has more positions than a stored image.
    """
    settings = folder.settings
    told = settings["provenance"] and pipeline.policy(method).uses_retrieval
    told = told and (part is None or part.codes.shape == pipeline.model.grid)
    for place, number in enumerate(batch.numbers.tolist()):
        if wanted[number]:
            image, drawn = batch.images[place], jax.tree.map(lambda x, place=place: x[place], batch.drawn)
            page, record = page_and_record(pipeline, method, prompts[number], image, drawn) if told else (None, None)
            texts = texts_of(prompts[number], settings["seed"] + number, method, settings["methods"][method])
            texts |= {} if part is None else part.facts
            rights = pipeline.search_of(method).store.rights if told else {}
            texts |= provenance_text(texts, record, rights)
            folder.add(name_of(number, method), upscale(image, settings["scale"]), texts, page, record)


def finish(pipeline: Pipeline, prompts: list[str], folder: RunFolder, part: Part | None = None) -> None:
    """Writes the grid of the first images and all provenance records; prints the mean shares of each method.

    The first column shows the image of which a part was drawn, if there is one. The last columns show the stored
    images with the most credit for the image of the last method.
    """
    titles = list(pipeline.methods)
    columns = [[folder.picture(name_of(i, method)) for i in range(len(prompts[:GRID_ROWS]))] for method in titles]
    credited = [
        [source["image"] for source in record["sources"]]
        for record in itertools.islice((r for r in folder.records() if r["method"] == titles[-1]), GRID_ROWS)
    ]
    if any(credited):
        columns += stored_columns(pipeline, titles[-1], credited, SOURCES)
        titles += ["stored"] * SOURCES
    if part is not None:
        columns, titles = [[part.shown] * len(columns[0]), *columns], ["image", *titles]
    rows = list(zip(prompts, map(list, zip(*columns, strict=True)), strict=False))
    shares: dict[str, list[dict[str, float]]] = {}
    for record in folder.records():
        kept = {key: value for key, value in record.items() if key.startswith("share_")}
        shares.setdefault(record["method"], []).append(kept)
    folder.finish(labelled_grid(rows, titles, folder.settings["scale"]))
    for method, records in shares.items():
        print(f"{method}: {summary(records)}")
