"""Draws a prompt set into a folder, image by image; it can be continued after an interruption, by several processes.

The work list holds each prompt's copies, sorted by the prompt's name. An image is done when its PNG is whole. Its seed
follows from the run's seed, the prompt's name and the copy's number alone, and all batches have the prompt length of
the whole set. Order, restarts and the number of processes therefore change nothing. ``run.json`` holds what the images
were made with; a folder of another run is refused.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.evaluation.image_codes import add_codes
from arrag_jax.evaluation.layouts import COPIES
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.evaluation.run_record import RunRecord, method_facts, texts_of
from arrag_jax.figures.grids import save
from arrag_jax.files import atomic_write, exclusive_lock, folder_in, remove_temporary
from arrag_jax.interfaces import FolderBenchmark, ImageFile, Prompt
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.parsing import differences
from arrag_jax.work import HERE, Engine, Opened, Report, run_work

MADE_BY = "arrag_jax.eval"
FOUND_IN = "prompts_in"  # the key of run.json that holds where the prompts are


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
    engine: Engine = HERE,
    known_words: bool = False,
    found_in: Mapping[str, Any] | None = None,
) -> None:
    """Draws what is missing of a prompt set into a folder.

    Args:
      engine: where the batches are drawn. Of several processes the first one waits for the others and completes the
        folder.
      known_words: draw only the words of each prompt that the model's tokenizer knows.
      found_in: where the prompts are, as JSON values; run.json keeps it, so that the folder can be scored without it.

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
    images = _Images.of(pipeline, benchmark, directory)
    begun, complete = (f"{what} of {directory}" for what in ("record", "end"))
    if not engine.leads:
        engine.meet(begun)
        _require_same(record, directory)
        _draw(pipeline, method, images, texts, record.settings, engine)
        engine.meet(complete)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory):
        held = _require_same(record, directory)
        if held is None or (found_in is not None and held.get(FOUND_IN) != found_in):
            record.write(**({} if found_in is None else {FOUND_IN: found_in}))
        for prompt in benchmark.prompts:
            for name, content in benchmark.layout.beside(prompt).items():
                path = directory / name
                if not path.exists() or path.read_text(encoding="utf-8") != content:
                    folder_in(directory, *Path(name).parent.parts)
                    with atomic_write(path) as temporary:
                        temporary.write_text(content, encoding="utf-8")
        engine.meet(begun)
        _draw(pipeline, method, images, texts, record.settings, engine)
        for folder in {images.path(number).parent for number in range(len(images))}:
            remove_temporary(folder)  # of workers that have died
        for prompt in benchmark.prompts:
            benchmark.layout.finish(directory, prompt, benchmark.copies)
        if (directory / COPIES).is_dir():
            (directory / COPIES).rmdir()
        engine.meet(complete)


def _require_same(record: RunRecord, directory: Path) -> dict[str, Any] | None:
    """Returns the record in the folder, None if there is none; raises UserError if it is that of another run."""
    found = record.read()
    if found is not None and found["settings"] != record.settings:
        other = differences(found["settings"], record.settings)
        raise UserError(f"{directory} holds images of another run: {other}; give its settings, or another --workdir")
    return found


@dataclasses.dataclass(frozen=True)
class _Images:
    """The images of a folder: number i is copy i % copies of prompt i // copies.

    Attributes:
      size: height and width of an image.
    """

    directory: Path
    layout: Any
    prompts: Sequence[Prompt]
    copies: int
    size: tuple[int, int]

    @classmethod
    def of(cls, pipeline: Pipeline, benchmark: FolderBenchmark, directory: Path) -> "_Images":
        height, width = pipeline.model.image_size
        return cls(directory, benchmark.layout, benchmark.prompts, benchmark.copies, (height, width))

    def __len__(self) -> int:
        return len(self.prompts) * self.copies

    def prompt(self, number: int) -> Prompt:
        return self.prompts[number // self.copies]

    def seeds(self, seed: int) -> np.ndarray:
        """Returns the seeds of all images of a run."""
        return np.array([seed_of(seed, self.prompt(i).name, i % self.copies) for i in range(len(self))])

    def path(self, number: int) -> Path:
        return self.directory / self.layout.drawn(self.prompt(number), number % self.copies, self.copies)

    def is_done(self, number: int) -> bool:
        """Returns whether an image is whole, or the file that was made from it."""
        path, files = self.path(number), self.layout.files(self.prompt(number), self.copies)
        if is_whole(path, self.size):
            return True
        made = [self.directory / file for file in files]
        return path not in made and all(map(is_whole, made))


def _draw(
    pipeline: Pipeline,
    method: str,
    images: _Images,
    texts: Sequence[str],
    settings: dict[str, Any],
    engine: Engine,
) -> None:
    """Draws the missing images, batch by batch."""
    batches = [batch.tolist() for batch in pipeline.batches(len(images))]
    done = np.array([images.is_done(number) for number in range(len(images))], bool)
    left = [number for number, batch in enumerate(batches) if not done[batch].all()]
    if left and done.any():
        progress.tell(f"continuing: {done.sum()} of {len(images)} images are drawn already")
    opened = Opened(functools.partial(open_pipeline, pipeline.config, [method], alone=True), pipeline)
    draw = functools.partial(_Drawer, opened, method, images, batches, texts, settings)
    sizes, label = dict.fromkeys(range(len(batches)), pipeline.positions), f"drawing {method} into {images.directory}"
    for _ in run_work(left, draw, sizes, label, unit="cell", noun="batch", engine=engine):
        pass


class _Drawer:
    """Draws the images of a batch, by its number, that are missing; a worker of ``work``."""

    def __init__(
        self,
        pipeline: Opened[Pipeline],
        method: str,
        images: _Images,
        batches: Sequence[Sequence[int]],
        texts: Sequence[str],
        settings: dict[str, Any],
    ):
        self._pipeline, self._method, self._images, self._batches = pipeline(), method, images, batches
        self._texts = [text for text in texts for _ in range(images.copies)]
        self._length, self._seeds = self._pipeline.text.length(texts), images.seeds(settings["seed"])
        self._settings, self._tokenizer = settings, self._pipeline.model.fingerprint

    def __call__(self, number: int, report: Report) -> None:
        numbers = np.array(self._batches[number])
        missing = [number for number in numbers.tolist() if not self._images.is_done(number)]
        what = (self._texts, self._method, self._seeds, numbers, self._length)
        batch = self._pipeline.draw_batch(*what, report.count)
        codes = np.asarray(batch.drawn.codes).reshape(-1, *self._pipeline.model.grid)
        for number, image, grid in zip(batch.numbers.tolist(), batch.images, codes, strict=True):
            if number in missing:
                self._write(number, image, grid)

    def _write(self, number: int, image: np.ndarray, codes: np.ndarray) -> None:
        path, info = self._images.path(number), PngInfo()
        folder_in(self._images.directory, *path.parent.relative_to(self._images.directory).parts)
        what = (self._images.prompt(number).text, int(self._seeds[number]), self._method, self._settings)
        for key, text in texts_of(*what).items():
            info.add_text(key, text)
        add_codes(info, codes, self._tokenizer)
        save(path, image, info)
