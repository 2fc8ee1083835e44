"""What the studio shows: drawings that form, where their codes came from, and files to take away. It knows no page."""

import dataclasses
import io
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax.config import DrawConfig, SamplingConfig
from arrag_jax.decode.loop import SampleOutput
from arrag_jax.decode.methods import BASELINE
from arrag_jax.decode.stream import joined, partial_images
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.provenance import page_and_record, stored_images
from arrag_jax.evaluation.run_record import method_facts, texts_of
from arrag_jax.figures.canvas import ORANGE, RGBImage, upscale
from arrag_jax.parsing import in_range
from arrag_jax.web.requests import LIMITS, MOST_SEED, mixing, placed

MOST_NEIGHBORS = 4096
SIDE = 384  # pixels to which small pictures are enlarged on the page


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a visitor asks for; one prompt, drawn plain and with a method that retrieves."""

    prompt: str
    method: str
    seed: int
    weight: float
    temperature: float
    sampling: SamplingConfig
    k: int | None = None  # neighbours per position; None = as the studio was started

    def __post_init__(self):
        if len(self.prompt) > LIMITS.prompt:
            raise UserError(f"the prompt has {len(self.prompt):,} characters, at most {LIMITS.prompt:,}")
        in_range("seed", self.seed, 0, MOST_SEED - 1)
        if self.k is not None:
            in_range("K", self.k, 1, MOST_NEIGHBORS)

    def changed(self, config: DrawConfig) -> DrawConfig:
        """Returns the config with these settings."""
        mixed = mixing(config, self.weight, self.temperature)
        return dataclasses.replace(mixed, sampling=self.sampling, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Two finished pictures of one prompt and seed.

    Attributes:
      pipeline: with the settings that drew them.
      plain, picture: drawn without and with retrieval.
      output: the codes of ``picture`` and where they came from.
      page, record: from ``evaluation.provenance.page_and_record``.
    """

    ask: Ask
    pipeline: Pipeline
    plain: RGBImage
    picture: RGBImage
    output: SampleOutput
    page: RGBImage
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Forming:
    """Two pictures while they form: what is not drawn yet is grey.

    Attributes:
      rows: how many rows of codes are drawn, of ``height``.
      seconds_left: estimated from the rows after the first, which may compile; None = not known yet.
    """

    plain: RGBImage
    picture: RGBImage
    rows: int
    height: int
    seconds_left: float | None


def draw(pipeline: Pipeline, ask: Ask) -> Iterator[Forming | Drawn]:
    """Yields two pictures of the same seed row by row, plain and with the asked method, and at last the finished ones.

    Nothing is drawn beyond what was asked for: a drawing ends when the caller closes this generator.

    Raises:
      UserError: if the prompt or a setting is not valid.
    """
    if ask.method not in pipeline.methods:
        raise UserError(f"method {ask.method!r} is not open here; choose one of {', '.join(pipeline.methods)}")
    own = dataclasses.replace(pipeline, config=ask.changed(pipeline.config))
    own = own if ask.k is None else own.with_k(ask.k)
    length, seeds = placed([ask.prompt], own), np.array([ask.seed])
    own.text.length([ask.prompt])
    streams = [own.rows([ask.prompt], method, seeds, length) for method in (BASELINE, ask.method)]
    parts: list[list[SampleOutput]] = [[], []]
    height, start = own.model.grid[0], 0.0
    for number, pair in enumerate(zip(*streams, strict=True), 1):
        for own_parts, row in zip(parts, pair, strict=True):
            own_parts.append(row)
        left = (time.perf_counter() - start) / (number - 1) * (height - number) if number > 1 else None
        plain, picture = (
            partial_images(own.model, np.concatenate([np.asarray(row.codes) for row in rows], axis=1))[0]
            for rows in parts
        )
        start = start or time.perf_counter()  # after the first row, which compiles
        yield Forming(plain, picture, number, height, left)
    output: SampleOutput = jax.tree.map(lambda x: x[0], joined(parts[1]))
    plain, picture = (own.pixels(np.asarray(joined(rows).codes))[0] for rows in parts)
    page, record = page_and_record(own, ask.method, ask.prompt, picture, output)
    yield Drawn(ask, own, plain, picture, output, page, record)


def enlarged(image: RGBImage) -> RGBImage:
    """Returns an image enlarged to about ``SIDE`` pixels, each pixel as a square."""
    return upscale(image, max(1, SIDE // max(image.shape[:2])))


def position_at(x: int, y: int, shape: tuple[int, ...], grid: tuple[int, int]) -> int:
    """Returns the position under a pixel of a picture of this shape; pixels outside count as those at the edge."""
    row, column = (min(max(at * cells // size, 0), cells - 1) for at, size, cells in zip((y, x), shape, grid))  # noqa: B905
    return row * grid[1] + column


def marked(image: RGBImage, position: int, grid: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an enlarged image with a frame around one position."""
    whole = enlarged(image).copy()
    row, column = divmod(position, grid[1])
    top, bottom = (whole.shape[0] * at // grid[0] for at in (row, row + 1))
    left, right = (whole.shape[1] * at // grid[1] for at in (column, column + 1))
    inner = whole[top + FRAME : bottom - FRAME, left + FRAME : right - FRAME].copy()
    whole[max(top - FRAME, 0) : bottom + FRAME, max(left - FRAME, 0) : right + FRAME] = ORANGE
    whole[top + FRAME : bottom - FRAME, left + FRAME : right - FRAME] = inner
    return whole


FRAME = 3  # pixels


def origin(drawn: Drawn, position: int) -> tuple[RGBImage | None, str, str]:
    """Returns the stored image behind a position, with its patch marked, what is known of it in words, and its name.

    Without such an image, that is None and its name is empty.
    """
    cell, grid = drawn.record["cells"][position], drawn.pipeline.model.grid
    row, column = divmod(position, grid[1])
    where = f"Row {row + 1}, column {column + 1}: code {cell['code']}. "
    moved = cell["log_p_moved"]
    if moved is None:
        effect = "The model alone could not have drawn it."
    else:
        more = "more" if moved >= 0 else "less"
        effect = f"Retrieval made it {np.exp(min(abs(moved), 50)):,.3g} times {more} likely (log p {moved:+.3f})."
    if cell["image"] is None:
        return None, f"{where}No neighbour holds this code. {effect}", ""
    source = drawn.pipeline.search_of(drawn.ask.method).store.sources[cell["image"]]
    many = cell["copies"] > 1
    held = f"{cell['copies']:,} stored {'patches are' if many else 'patch is'} equal to it"
    held += f", in {cell['images']:,} images" if cell["images"] > 1 else ""
    share = "" if cell["retrieved"] is None else f" {cell['retrieved']:.0%} of this draw is retrieval's."
    words = (
        f"{where}Neighbour {cell['rank'] + 1}, squared distance {cell['distance']:.4g}, from `{source}`; {held}. "
        f"{effect}{share}"
    )
    stored = stored_images(drawn.pipeline, drawn.ask.method, [cell["image"]])[cell["image"]]
    return marked(stored, cell["image_cell"], grid), words, source


def sources(drawn: Drawn) -> list[tuple[RGBImage, str]]:
    """Returns the stored images with the most positions of a picture, with a caption each."""
    told = drawn.record["sources"]
    images = stored_images(drawn.pipeline, drawn.ask.method, [each["image"] for each in told]) if told else {}
    captions = [f"{each['cells']} cell{'s' * (each['cells'] > 1)}: {each['source']}" for each in told]
    return [(enlarged(images[each["image"]]), caption) for each, caption in zip(told, captions, strict=True)]


def audit(record: Mapping[str, Any]) -> str:
    """Returns in words how much of a picture equals stored images."""
    near, largest = record["nearest_in_place"], record["share_largest_copy"]
    found = "No run of adjacent codes equals a stored image."
    if largest:
        copied = record["share_copied"]
        found = f"{copied:.0%} of the picture lies in runs that equal a stored image, {largest:.0%} in the largest one."
    return (
        f"{found} The stored image nearest in place, `{near['source']}`, equals it at {near['share_equal']:.0%} of the "
        f"positions. {record['share_among_neighbors']:.0%} of the codes are among the neighbours, "
        f"{record['share_common']:.0%} as common ground."
    )


def command(drawn: Drawn, config: str) -> str:
    """Returns the command line that draws the same picture.

    Args:
      config: the config file that the studio was started with.
    """
    ask, base = drawn.ask, drawn.pipeline.config
    words = ["python", "-m", "arrag_jax.generate", f"--config={config}", "--workdir=pictures", f"--method={ask.method}"]
    words += ["--scale=1", f"--prompt={ask.prompt}", f"--config.seed={ask.seed}"]
    words += [f"--config.retrieval.store={base.retrieval.store}"]
    words += [f"--config.retrieval.search={base.retrieval.search}", f"--config.retrieval.k={base.retrieval.k}"]
    words += [f"--config.hidden.k={base.hidden.k}"]
    for section in ("daid", "caption.daid", "hidden.daid", "hidden.gated", "hidden.gated_caption", "hidden.cut"):
        words += [f"--config.{section}.weight={ask.weight}", f"--config.{section}.temperature={ask.temperature}"]
    for name, value in dataclasses.asdict(ask.sampling).items():
        words.append(f"--config.sampling.{name}={value}")
    return shlex.join(words)


def files(drawn: Drawn) -> list[str]:
    """Returns the paths of new temporary files: the two pictures with what drew them as text, the page, the record."""
    folder = Path(tempfile.mkdtemp(prefix="arrag_studio_"))
    ask = drawn.ask
    for method, image in ((BASELINE, drawn.plain), (ask.method, drawn.picture)):
        info = PngInfo()
        for key, text in texts_of(ask.prompt, ask.seed, method, method_facts(drawn.pipeline, method)).items():
            info.add_text(key, text)
        (folder / f"{method}.png").write_bytes(_png(image, info))
    (folder / "provenance.png").write_bytes(_png(drawn.page))
    (folder / "provenance.json").write_text(json.dumps(drawn.record, indent=1, ensure_ascii=False), encoding="utf-8")
    return [str(path) for path in sorted(folder.iterdir())]


def _png(image: RGBImage, info: PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG", pnginfo=info)
    return file.getvalue()
