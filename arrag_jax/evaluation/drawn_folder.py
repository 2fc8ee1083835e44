"""Draws a prompt set into a folder, image by image; it can be continued after an interruption, by several processes.

The work list holds each prompt's copies, sorted by the prompt's name. An image is done when its PNG is whole. Its seed
follows from the run's seed, the prompt's name and the copy's number alone, and all batches have the prompt length of
the whole set. Order, restarts and the number of processes therefore change nothing. ``run.json`` holds what the images
were made with; a folder of another run is refused.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax import progress, signals
from arrag_jax.errors import UserError
from arrag_jax.evaluation.image_codes import add_codes
from arrag_jax.evaluation.layouts import COPIES
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.run_record import RunRecord, method_facts, texts_of
from arrag_jax.figures.grids import save
from arrag_jax.files import atomic_write, exclusive_lock, folder_in
from arrag_jax.interfaces import FolderBenchmark, ImageFile, Prompt
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.parsing import differences
from arrag_jax.work import Processes

MADE_BY = "arrag_jax.eval"
BATCH_SECONDS = 60.0  # time limit to finish the current batch after a signal


def seed_of(seed: int, name: str, copy: int) -> int:
    """Returns the seed, below 2^31, of one image of a prompt."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{copy}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def hash_of(prompts: Sequence[Prompt]) -> str:
    """Returns the identity of a prompt set, 16 hex digits: names, texts and lines."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr(tuple(prompt)).encode())
    return digest.hexdigest()[:16]


def settings_of(pipeline: Pipeline, method: str, benchmark: FolderBenchmark, known_words: bool) -> dict[str, Any]:
    """Returns everything that the images depend on; batch size, mesh and number of processes are not among it."""
    config = pipeline.config
    return {
        "prompts": hash_of(benchmark.prompts),
        "num_prompts": len(benchmark.prompts),
        "copies": benchmark.copies,
        "layout": benchmark.layout.name,
        "seed": config.seed,
        "method": method,
        **method_facts(pipeline, method),
        "dtype": config.dtype,
        "sampling": dataclasses.asdict(config.sampling),
        "image_size": list(pipeline.model.image_size),
        "known_words": known_words,
    }


def is_whole(path: Path, size: tuple[int, int] | None = None) -> bool:
    """Returns whether a PNG file exists and is not damaged: every chunk has its checksum.

    Args:
      size: the height and width that the image must have; None = any.

    Raises:
      UserError: if it is a whole image of another size.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = (image.height, image.width)
            image.verify()
    except (OSError, SyntaxError, ValueError):  # absent, or what PIL raises for damaged files
        return False
    if size is not None and found != size:
        raise UserError(
            f"{path} has {found[0]} x {found[1]} pixels, where this run draws {size[0]} x {size[1]}; delete it, or "
            "choose another --workdir"
        )
    return True


def image_files(benchmark: FolderBenchmark) -> list[ImageFile]:
    """Returns the image files of a complete folder, in the order of the prompts."""
    layout, copies = benchmark.layout, benchmark.copies
    return [ImageFile(prompt, path) for prompt in benchmark.prompts for path in layout.files(prompt, copies)]


def draw_folder(
    pipeline: Pipeline,
    method: str,
    benchmark: FolderBenchmark,
    directory: Path,
    engine: Processes,
    known_words: bool = False,
) -> None:
    """Draws what is missing of a prompt set into a folder.

    The processes share the batches. The first one waits for the others and completes the folder.

    Args:
      engine: the processes of the run.
      known_words: draw only the words of each prompt that the model's tokenizer knows.

    Raises:
      UserError: if a prompt cannot be drawn, the folder holds images of another run or another size, or
        another process has ended.
    """
    record = RunRecord(directory, MADE_BY, settings_of(pipeline, method, benchmark, known_words))
    texts = [prompt.text for prompt in benchmark.prompts]
    if known_words:
        if not isinstance(pipeline.text, PromptTokenizer):
            raise UserError("--known_words needs a model with a tokenizer of words; leave it out")
        texts = [pipeline.text.known_part(text) for text in texts]
    pipeline.text.length(texts)  # reports a bad prompt before the first image
    work = _Work(pipeline, method, benchmark, directory, texts)
    begun, drawn, complete = (f"{what} of {directory}" for what in ("record", "images", "end"))
    if not engine.leads:
        engine.meet(begun)
        _require_same(record, directory)
        work.draw(record.settings, engine)
        engine.meet(drawn)
        engine.meet(complete)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        if not _require_same(record, directory):
            record.write()
        for prompt in benchmark.prompts:
            for name, content in benchmark.layout.beside(prompt).items():
                path = directory / name
                if not path.exists() or path.read_text(encoding="utf-8") != content:
                    folder_in(directory, *Path(name).parent.parts)
                    with atomic_write(path) as temporary:
                        temporary.write_text(content, encoding="utf-8")
        engine.meet(begun)
        work.draw(record.settings, engine)
        engine.meet(drawn)
        for prompt in benchmark.prompts:
            benchmark.layout.finish(directory, prompt, benchmark.copies)
        if (directory / COPIES).is_dir():
            (directory / COPIES).rmdir()
        engine.meet(complete)


def _require_same(record: RunRecord, directory: Path) -> bool:
    """Returns whether the folder has a record; raises UserError if it is that of another run."""
    found = record.read()
    if found is not None and found["settings"] != record.settings:
        other = differences(found["settings"], record.settings)
        raise UserError(f"{directory} holds images of another run: {other}; give its settings, or another --workdir")
    return found is not None


class _Work:
    """The work list of a folder: item i is copy i % copies of prompt i // copies."""

    def __init__(
        self, pipeline: Pipeline, method: str, benchmark: FolderBenchmark, directory: Path, texts: Sequence[str]
    ):
        self._pipeline, self._method, self._directory = pipeline, method, directory
        self._layout, self._copies = benchmark.layout, benchmark.copies
        self._items = [(prompt, copy) for prompt in benchmark.prompts for copy in range(benchmark.copies)]
        self._texts = [text for text in texts for _ in range(benchmark.copies)]
        height, width = pipeline.model.image_size
        self._size, self._tokenizer = (height, width), pipeline.model.fingerprint

    def is_done(self, item: int) -> bool:
        """Returns whether an item's image is whole, or the file that was made from it."""
        prompt, copy = self._items[item]
        drawn = self._layout.drawn(prompt, copy, self._copies)
        files = self._layout.files(prompt, self._copies)
        if is_whole(self._directory / drawn, self._size):
            return True
        return drawn not in files and all(is_whole(self._directory / file) for file in files)

    def draw(self, settings: dict[str, Any], engine: Processes) -> None:
        """Draws the missing items of this process's batches."""
        pipeline, count = self._pipeline, len(self._items)
        own = pipeline.batches(count)[engine.index :: engine.count]
        wanted = np.zeros(count, bool)
        for item in (int(item) for batch in own for item in batch):
            wanted[item] = not self.is_done(item)
        there = sum(map(len, own)) - int(wanted.sum())
        if there and wanted.any():
            progress.tell(f"continuing: {there} of {there + int(wanted.sum())} images are drawn already")
        if not wanted.any():
            return
        seeds = np.array([seed_of(settings["seed"], prompt.name, copy) for prompt, copy in self._items])
        with signals.held("batch", BATCH_SECONDS) as point:
            for batch in pipeline.draw(self._texts, self._method, seeds, wanted):
                codes = np.asarray(batch.drawn.codes).reshape(-1, *pipeline.model.grid)
                for item, image, grid in zip(batch.numbers.tolist(), batch.images, codes, strict=True):
                    if wanted[item]:
                        self._write(item, image, grid, int(seeds[item]), settings)
                point.check()

    def _write(self, item: int, image: np.ndarray, codes: np.ndarray, seed: int, settings: dict[str, Any]) -> None:
        prompt, copy = self._items[item]
        path, info = self._directory / self._layout.drawn(prompt, copy, self._copies), PngInfo()
        folder_in(self._directory, *path.parent.relative_to(self._directory).parts)
        for key, text in texts_of(prompt.text, seed, self._method, settings).items():
            info.add_text(key, text)
        add_codes(info, codes, self._tokenizer)
        save(path, image, info)
