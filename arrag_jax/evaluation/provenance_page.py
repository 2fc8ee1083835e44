"""The figure that shows where one drawn picture came from: four panels side by side."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from arrag_jax.evaluation.canvas import (
    BLUE,
    FAINT,
    MARGIN,
    ORANGE,
    PALETTE,
    Canvas,
    Picture,
    fitted,
    framed,
    greyed,
    text_size,
    tinted,
    upscale,
)

OTHER_COLOR = (70, 70, 70)  # retrieved from a source outside the legend
STRONGEST = 0.75  # share of the colour where the retrieval moved the draw most


def provenance_page(
    image: UInt8[np.ndarray, "h w 3"],
    source: Int[np.ndarray, "H W"],
    moved: Float[np.ndarray, "H W"],
    sources: Mapping[int, Picture],
    scale: int = 6,
    top: int = 5,
) -> Picture:
    """A drawn picture; each cell's origin; how far retrieval moved each draw; the stored images it drew from.

    Origin: a cell whose code was retrieved is framed and tinted in its source's colour, any other is greyed.
    Moved: orange where retrieval made the drawn code likelier, blue where less likely; the strongest colour stands for
    the largest finite change of the picture, and for codes that the model alone could not have drawn.
    The legend shows the ``top`` sources by number of cells (ties: the lower id), then what is left.

    Args:
      image: the drawn picture; its sides are multiples of the grid's.
      source: id of the stored image that each cell's code was drawn from; -1 = it was not retrieved.
      moved: log-probability of each draw, less what it was before retrieval; +inf: the model could not have drawn it.
      sources: id → thumbnail, at least of the sources that the legend shows.
      scale: whole factor by which the picture is enlarged.
      top: sources in the legend, at most ``len(PALETTE)``.

    Raises:
      ValueError: if the picture does not divide into the grid, ``top`` is too large, or a thumbnail is missing.
    """
    (height, width), (rows, columns) = image.shape[:2], source.shape
    if height % rows or width % columns:
        raise ValueError(f"a {height} x {width} picture does not divide into {rows} x {columns} cells")
    if top > len(PALETTE):
        raise ValueError(f"top={top} is more than the {len(PALETTE)} colours that tell sources apart")
    shown = _most_used(source, top)
    missing = [i for i in shown if i not in sources]
    if missing:
        raise ValueError(f"no thumbnail of source images {missing}")
    large = upscale(image, scale)
    least, most = min(0.0, moved.min()), _largest(np.maximum(moved, 0))
    panels = [
        ("drawn", large),
        ("origin of each cell", _origins(image, scale, source, shown)),
        (f"log p moved by {least:.2f} to {most:+.2f}", _changes(image, scale, moved)),
        ("stored images drawn from", _legend(shown, sources, source, large.shape[0])),
    ]
    head = MARGIN + text_size("Ag")[1] + MARGIN // 2
    wide = [max(panel.shape[1], text_size(title)[0]) for title, panel in panels]
    canvas = Canvas(head + max(p.shape[0] for _, p in panels) + MARGIN, MARGIN + sum(w + MARGIN for w in wide))
    x = MARGIN
    for (title, panel), step in zip(panels, wide, strict=True):
        canvas.text(x, head - MARGIN // 2, title, "ld")
        canvas.paste(x, head, panel)
        x += step + MARGIN
    return canvas.pixels()


Shown = Mapping[int, tuple[tuple[int, int, int], int]]  # source image → its colour and number of cells


def _most_used(source: Int[np.ndarray, "H W"], top: int) -> Shown:
    ids, counts = np.unique(source[source >= 0], return_counts=True)
    order = np.lexsort((ids, -counts))[:top]
    return {int(ids[place]): (PALETTE[rank], int(counts[place])) for rank, place in enumerate(order)}


def _place(cell: tuple[int, int], image: Picture, scale: int, grid: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a cell in the enlarged picture."""
    steps = [scale * side // cells for side, cells in zip(image.shape[:2], grid, strict=True)]
    return tuple(slice(i * step, (i + 1) * step) for i, step in zip(cell, steps, strict=True))


def _origins(image: Picture, scale: int, source: Int[np.ndarray, "H W"], shown: Shown) -> Picture:
    marked, large = upscale(greyed(image), scale), upscale(image, scale)
    for row, column in np.argwhere(source >= 0).tolist():
        place = _place((row, column), image, scale, source.shape)
        color, _ = shown.get(int(source[row, column]), (OTHER_COLOR, 0))
        marked[place] = framed(tinted(large[place], color), color, max(1, large[place].shape[1] // 12))
    return marked


def _changes(image: Picture, scale: int, moved: Float[np.ndarray, "H W"]) -> Picture:
    colored = upscale(greyed(image), scale)
    share = np.minimum(np.abs(moved) / (_largest(np.abs(moved)) or 1.0), 1.0) * STRONGEST
    for row, column in np.argwhere(share > 0).tolist():
        place = _place((row, column), image, scale, moved.shape)
        color = ORANGE if moved[row, column] > 0 else BLUE
        colored[place] = tinted(colored[place], color, float(share[row, column]))
    return colored


def _largest(values: Float[np.ndarray, "H W"]) -> float:
    """The largest finite value; 0 if there is none."""
    return float(values[np.isfinite(values)].max(initial=0.0))


def _legend(shown: Shown, sources: Mapping[int, Picture], source: Int[np.ndarray, "H W"], height: int) -> Picture:
    """Thumbnails in their colour's frame with their numbers of cells, then the cells that are left."""
    frame, line, retrieved = 3, text_size("Ag")[1] + 6, int((source >= 0).sum())
    rest = [
        (OTHER_COLOR, f"other images: {retrieved - sum(count for _, count in shown.values())}"),
        ((200, 200, 200), f"not retrieved: {source.size - retrieved}"),
    ]
    free = height - line * len(rest)
    thumb = min(96, max(24, free // max(1, len(shown)) - 2 * frame - 6))
    step = thumb + 2 * frame + 6
    canvas = Canvas(max(height, step * len(shown) + line * len(rest)), max(200, thumb + 120))
    for rank, (image, (color, count)) in enumerate(shown.items()):
        bordered = np.pad(fitted(sources[image], thumb), ((frame, frame), (frame, frame), (0, 0)))
        canvas.paste(0, rank * step, framed(bordered, color, frame))
        middle = rank * step + frame + thumb // 2
        canvas.text(thumb + 2 * frame + 8, middle - 1, f"{count} cell{'s' * (count != 1)}", "ld")
        canvas.text(thumb + 2 * frame + 8, middle + 1, f"image {image}", "la", FAINT)
    for row, (color, words) in enumerate(rest):
        y = step * len(shown) + row * line
        canvas.paste(0, y + line // 2 - 6, np.full((12, 12, 3), color, np.uint8))
        canvas.text(20, y + line // 2, words, "lm")
    return canvas.pixels()
