"""Runs a benchmark over a folder of images: draws the folder, scores it, and records what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arrag_jax.config import DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import measurements
from arrag_jax.evaluation.drawn_folder import MADE_BY, draw_folder, hash_of, image_files, is_whole
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.evaluation.run_record import RunRecord
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import FolderBenchmark, ImageFile
from arrag_jax.work import HERE, Engine

NAMED = 5  # missing images that a message names


def run(
    config: DrawConfig | None,
    workdir: str,
    name: str,
    benchmark: FolderBenchmark,
    method: str = "",
    draw: bool = True,
    score: bool = True,
    allow_missing: bool = False,
    known_words: bool = False,
    engine: Engine = HERE,
) -> None:
    """Draws a benchmark's images and scores them; prints a table and writes results.json.

    With ``method``, or without drawing, ``workdir`` is the folder of the images. Otherwise every method of the config
    is drawn into a folder of its name below.

    Args:
      config: None = nothing is drawn.
      name: of the benchmark.
      draw, score: leave out one of the two steps.
      allow_missing: score a folder that lacks images; they are counted and named in results.json.
      known_words: draw only the words of each prompt that the model's tokenizer knows.
      engine: where images are drawn and their features computed.

    Raises:
      UserError: if nothing can be drawn or scored; as ``draw_folder``, ``open_pipeline`` and the benchmark.
    """
    out = Path(workdir)
    # a missing file is reported before anything is drawn
    protocol = benchmark.protocol() if score and engine.leads else {}
    records: dict[str, dict[str, Any]] = {}
    if draw:
        if config is None:
            raise UserError("missing --config (see --help); it is needed unless --score_only is given")
        pipeline = open_pipeline(config, [method] if method else [], alone=True)
        folders = {each: out if method else out / each for each in pipeline.methods}
        require_writable(out)
        for each, folder in folders.items():
            draw_folder(pipeline, each, benchmark, folder, engine, known_words)
    else:
        folders = {method or out.name: out}
    if not engine.leads:
        return
    if not score:
        count = len(benchmark.prompts) * benchmark.copies
        print(f"drew {count} images of {len(benchmark.prompts)} prompts: {', '.join(map(str, folders.values()))}")
        return
    for each, folder in folders.items():
        records[each] = score_folder(folder, name, benchmark, protocol, allow_missing, engine.alone())
    print(measurements.table(records))
    for note in dict.fromkeys(note for record in records.values() for note in record["notes"]):
        print(f"note: {note}")


def score_folder(
    folder: Path,
    name: str,
    benchmark: FolderBenchmark,
    protocol: dict[str, Any],
    allow_missing: bool,
    engine: Engine = HERE,
) -> dict[str, Any]:
    """Scores the images of a folder; writes results.json and returns its content.

    Raises:
      UserError: if images are missing and not ``allow_missing``, or the folder's run drew other prompts.
    """
    settings = {"prompts": hash_of(benchmark.prompts), "copies": benchmark.copies}
    drawn = RunRecord(folder, MADE_BY, {}).read()
    if drawn is not None:
        wrong = [key for key, value in settings.items() if drawn["settings"].get(key) != value]
        if wrong:
            raise UserError(f"{folder} holds images of another run ({', '.join(wrong)} differ); give its own flags")
    images, missing = present(folder, image_files(benchmark))
    if missing and not (allow_missing and images):
        count = f"{len(missing)} of {len(missing) + len(images)} images"
        raise UserError(
            f"{folder} lacks {count}: {named(missing)}; draw them, or give --allow_missing to score the others"
        )
    require_writable(folder)
    measured = benchmark.measure(folder, images, engine)
    if missing:
        note = f"{len(missing)} of {len(missing) + len(images)} images are missing and not scored: {named(missing)}"
        measured = measured._replace(notes=(note, *measured.notes))
    images_of = {"copies": benchmark.copies, "missing": missing, "drawn": drawn["settings"] if drawn else None}
    record = measurements.record_of(name, {"prompts": settings["prompts"], **protocol}, images_of, measured)
    write_json(folder / measurements.RESULTS, record)
    return record


def present(folder: Path, images: Sequence[ImageFile]) -> tuple[list[ImageFile], list[str]]:
    """Returns the images of a folder that are whole, and the paths of the others."""
    whole = [is_whole(folder / image.path) for image in images]
    there = [image for image, is_there in zip(images, whole, strict=True) if is_there]
    return there, [image.path for image, is_there in zip(images, whole, strict=True) if not is_there]


def named(paths: Sequence[str]) -> str:
    """Returns the first paths as text, and how many follow."""
    more = f", and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more
