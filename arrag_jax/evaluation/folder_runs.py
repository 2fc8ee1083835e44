"""Runs a benchmark over a folder of images: draws the folder, scores it, and records what was measured."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arrag_jax.config import DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation import measurements
from arrag_jax.evaluation.copy_audit import audited, store_for
from arrag_jax.evaluation.drawn_folder import FOUND_IN, MADE_BY, draw_folder, hash_of, image_files, is_whole
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.evaluation.run_record import RunRecord
from arrag_jax.files import require_writable, write_json
from arrag_jax.interfaces import FolderBenchmark, ImageFile
from arrag_jax.store.datastore import Datastore
from arrag_jax.work import HERE, Engine

NAMED = 5  # missing images that a message names


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done with a folder.

    Attributes:
      draw, score: the two steps.
      allow_missing: score a folder that lacks images; they are counted and named in results.json.
      known_words: draw only the words of each prompt that the model's tokenizer knows.
      copies_of: the datastore in which copies are looked for, as in ``copy_audit.store_for``.
      found_in: where the prompts are, from ``place_of``; None = not known.
    """

    draw: bool = True
    score: bool = True
    allow_missing: bool = False
    known_words: bool = False
    copies_of: str = ""
    found_in: Mapping[str, Any] | None = None

    def __post_init__(self):
        if not (self.draw or self.score):
            raise UserError("--draw_only and --score_only exclude one another; give one of them, or neither to do both")


def place_of(prompts: str, limit: int) -> dict[str, Any]:
    """Returns where a prompt set is, and how many of its prompts are used, as run.json keeps it."""
    return {"path": os.path.abspath(prompts), "limit": limit}


def drawn_from(workdir: str, prompts: str, copies: int, limit: int) -> tuple[str, int, int]:
    """Returns prompts, copies and limit for scoring a folder; what is not given is that of the run that drew it.

    Raises:
      UserError: if the folder's run.json is damaged, or the prompts that it names are gone.
    """
    found = RunRecord(Path(workdir), MADE_BY, {}).read()
    if found is None:
        return prompts, copies, limit
    held = found.get(FOUND_IN)
    if not (isinstance(held, dict) and isinstance(held.get("path"), str) and isinstance(held.get("limit"), int)):
        return prompts, copies, limit  # drawn through Python, or by an older version
    if not prompts and not os.path.exists(held["path"]):
        raise UserError(f"{workdir} was drawn from {held['path']}, which is gone; give its copy as --prompts")
    return prompts or held["path"], copies or found["settings"].get("copies", 0), limit or held["limit"]


def run(
    config: DrawConfig | None,
    workdir: str,
    name: str,
    benchmark: FolderBenchmark,
    method: str = "",
    steps: Steps = Steps(),
    engine: Engine = HERE,
) -> None:
    """Draws a benchmark's images and scores them; prints a table and writes results.json.

    With ``method``, or without drawing, ``workdir`` is the folder of the images. Otherwise every method of the config
    is drawn into a folder of its name below.

    Args:
      config: None = nothing is drawn.
      name: of the benchmark.
      engine: where images are drawn and their features computed.

    Raises:
      UserError: if nothing can be drawn or scored; as ``draw_folder``, ``open_pipeline`` and the benchmark.
    """
    out = Path(workdir)
    scorer = Scorer.of(name, benchmark, steps, config, engine)  # a missing file is reported before anything is drawn
    if steps.draw:
        if config is None:
            raise UserError("missing --config (see --help); it is needed unless --score_only is given")
        pipeline = open_pipeline(config, [method] if method else [], alone=True)
        folders = {each: out if method else out / each for each in pipeline.methods}
        require_writable(out)
        for each, folder in folders.items():
            draw_folder(pipeline, each, benchmark, folder, engine, steps.known_words, steps.found_in)
    else:
        folders = {method or out.name: out}
    if not engine.leads:
        return
    if not steps.score:
        count = len(benchmark.prompts) * benchmark.copies
        print(f"drew {count} images of {len(benchmark.prompts)} prompts: {', '.join(map(str, folders.values()))}")
        return
    records = {each: scorer.score(folder) for each, folder in folders.items()}
    print(measurements.table(records))
    for note in dict.fromkeys(note for record in records.values() for note in record["notes"]):
        print(f"note: {note}")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores folders of images.

    Attributes:
      name: of the benchmark.
      protocol: everything that the figures depend on beside the images.
      config: names a store in which copies are looked for; None = none.
    """

    name: str
    benchmark: FolderBenchmark
    steps: Steps
    protocol: dict[str, Any]
    config: DrawConfig | None
    engine: Engine

    @classmethod
    def of(
        cls, name: str, benchmark: FolderBenchmark, steps: Steps, config: DrawConfig | None, engine: Engine
    ) -> "Scorer":
        """Opens what scoring needs, in the process that scores.

        Raises:
          UserError: if one of it cannot be opened.
        """
        protocol = {"prompts": hash_of(benchmark.prompts)}
        if steps.score and engine.leads:
            protocol |= benchmark.protocol()
            if steps.copies_of:
                store_for(steps.copies_of, None, None)  # raises if there is none
        return cls(name, benchmark, steps, protocol, config, engine.alone())

    def score(self, folder: Path) -> dict[str, Any]:
        """Scores the images of a folder; writes results.json and returns its content.

        Raises:
          UserError: if images are missing and that is not allowed, or the folder's run drew other prompts.
        """
        benchmark = self.benchmark
        drawn = self.drawn(folder)
        images, missing = present(folder, image_files(benchmark))
        if missing and not (self.steps.allow_missing and images):
            count = f"{len(missing)} of {len(missing) + len(images)} images"
            raise UserError(
                f"{folder} lacks {count}: {named(missing)}; draw them, or give --allow_missing to score the others"
            )
        require_writable(folder)
        store, audit = store_for(self.steps.copies_of, drawn, self.config), None
        measured = benchmark.measure(folder, images, self.engine)
        if isinstance(store, Datastore):
            measured, audit = audited(measured, folder, images, benchmark, store, self.engine)
        elif store:
            measured = measured._replace(notes=(*measured.notes, store))
        if missing:
            note = f"{len(missing)} of {len(missing) + len(images)} images are missing and not scored: {named(missing)}"
            measured = measured._replace(notes=(note, *measured.notes))
        images_of = {"copies": benchmark.copies, "missing": missing, "drawn": drawn, "audit": audit}
        record = measurements.record_of(self.name, self.protocol, images_of, measured)
        write_json(folder / measurements.RESULTS, record)
        return record

    def kept(self, folder: Path) -> dict[str, Any] | None:
        """Returns the results in a folder if all its images were scored in this way; None if it has to be scored."""
        drawn, path = self.drawn(folder), folder / measurements.RESULTS
        if drawn is None or not path.exists():
            return None
        record = measurements.read_results(str(folder))
        store = store_for(self.steps.copies_of, drawn, self.config)
        looked_in = store.store_fingerprint if isinstance(store, Datastore) else None
        is_same = (
            record["protocol_hash"] == measurements.protocol_hash(self.name, self.protocol)
            and record["images"].get("drawn") == drawn
            and not record["images"].get("missing")
            and (record["images"].get("audit") or {}).get("fingerprint") == looked_in
        )
        return record if is_same else None

    def drawn(self, folder: Path) -> dict[str, Any] | None:
        """Returns the settings that the images of a folder were drawn with; None if another program drew them.

        Raises:
          UserError: if other prompts were drawn.
        """
        found = RunRecord(folder, MADE_BY, {}).read()
        if found is None:
            return None
        benchmark, place = self.benchmark, found.get(FOUND_IN)
        settings = {"layout": benchmark.layout.name, "prompts": hash_of(benchmark.prompts), "copies": benchmark.copies}
        wrong = [key for key, value in settings.items() if found["settings"].get(key) != value]
        if wrong == ["prompts"] and place is not None and place == self.steps.found_in:
            raise UserError(f"{place['path']} has changed since {folder} was drawn from it; give --prompts as it was")
        if wrong:
            raise UserError(f"{folder} holds images of another run ({', '.join(wrong)} differ); give its own flags")
        return found["settings"]


def present(folder: Path, images: Sequence[ImageFile]) -> tuple[list[ImageFile], list[str]]:
    """Returns the images of a folder that are whole, and the paths of the others."""
    whole = [is_whole(folder / image.path) for image in images]
    there = [image for image, is_there in zip(images, whole, strict=True) if is_there]
    return there, [image.path for image, is_there in zip(images, whole, strict=True) if not is_there]


def named(paths: Sequence[str]) -> str:
    """Returns the first paths as text, and how many follow."""
    more = f", and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more
