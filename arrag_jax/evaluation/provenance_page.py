"""The figure that shows where one drawn picture came from: panels side by side."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from arrag_jax.figures.canvas import (
    BLUE,
    FAINT,
    MARGIN,
    ORANGE,
    PALETTE,
    PAPER,
    Canvas,
    RGBImage,
    fitted,
    framed,
    greyed,
    tinted,
    upscale,
)
from arrag_jax.figures.lettering import shortened, text_size

NOT_FOUND, COMMON_GROUND = -1, -2  # in a map of sources
OTHER_COLOR = (70, 70, 70)  # found in an image outside the legend
STRONGEST = 0.75  # share of the colour where the retrieval moved the draw most
LEAST_RANGE = 0.1  # of log p: smaller moves than this stay pale, even where they are a picture's largest
PANEL = 288  # pixels; smaller pictures are enlarged towards it
NAMES = 210  # pixels for the name of a stored image


def provenance_page(
    image: UInt8[np.ndarray, "h w 3"],
    source: Int[np.ndarray, "H W"],
    moved: Float[np.ndarray, "H W"] | None,
    sources: Mapping[int, RGBImage],
    names: Mapping[int, str],
    scale: int | None = None,
    top: int = 5,
) -> RGBImage:
    """Returns a drawn picture; each cell's origin; how far retrieval moved each draw; the stored images beside it.

    Origin: a cell whose patch a stored image holds is framed and tinted in that image's colour; common ground, which
    very many images hold, keeps its own colours without a frame; what no neighbour holds is greyed.
    Moved: orange where retrieval made the drawn code likelier, blue where less likely; the strongest colour stands for
    the largest finite change of the picture (at least ``LEAST_RANGE``), and for codes that the model alone could not
    have drawn.
    The legend shows the ``top`` sources by number of positions (ties: the lower id), then what is left.

    Args:
      image: the drawn picture; its sides are multiples of the grid's.
      source: id of the stored image that each position is shown as coming from, ``NOT_FOUND`` or ``COMMON_GROUND``.
      moved: log-probability of each draw, less what it was before retrieval; +inf: the model could not have drawn it.
        None: the method mixes nothing, and there is no such panel.
      sources: id → thumbnail, at least of the sources that the legend shows.
      names: id → where that image came from, likewise; long ones are shortened in the middle.
      scale: whole factor by which the picture is enlarged; None = the one that brings it nearest below ``PANEL``.
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
    missing = [i for i in shown if i not in sources or i not in names]
    if missing:
        raise ValueError(f"no thumbnail or name of source images {missing}")
    scale = scale or max(1, PANEL // max(height, width))
    large = upscale(image, scale)
    panels = [("drawn", large), ("stored images that hold its patches", _origins(image, scale, source, shown))]
    if moved is not None:
        panels.append((f"log p moved by {_range(moved)}", _changes(image, scale, moved)))
    panels.append(("these stored images", _legend(shown, sources, names, source, large.shape[0])))
    head = MARGIN + text_size("Ag")[1] + MARGIN // 2
    wide = [max(panel.shape[1], text_size(title)[0]) for title, panel in panels]
    canvas = Canvas(head + max(p.shape[0] for _, p in panels) + MARGIN, MARGIN + sum(w + MARGIN for w in wide))
    x = MARGIN
    for (title, panel), step in zip(panels, wide, strict=True):
        canvas.text(x, head - MARGIN // 2, title, "ld")
        canvas.paste(x, head, panel)
        x += step + MARGIN
    return canvas.pixels()


def _range(moved: Float[np.ndarray, "H W"]) -> str:
    """From the least to the largest change, zero included, in two digits."""
    return f"{min(0.0, float(moved.min())):.2g} to {max(0.0, float(moved.max())):+.2g}"


Shown = Mapping[int, tuple[tuple[int, int, int], int]]  # source image → its colour and number of cells


def _most_used(source: Int[np.ndarray, "H W"], top: int) -> Shown:
    ids, counts = np.unique(source[source >= 0], return_counts=True)
    order = np.lexsort((ids, -counts))[:top]
    return {int(ids[place]): (PALETTE[rank], int(counts[place])) for rank, place in enumerate(order)}


def _place(position: tuple[int, int], image: RGBImage, scale: int, grid: tuple[int, int]) -> tuple[slice, slice]:
    """The pixels of a cell in the enlarged picture."""
    steps = [scale * side // positions for side, positions in zip(image.shape[:2], grid, strict=True)]
    rows, columns = (slice(i * step, (i + 1) * step) for i, step in zip(position, steps, strict=True))
    return rows, columns


def _origins(image: RGBImage, scale: int, source: Int[np.ndarray, "H W"], shown: Shown) -> RGBImage:
    marked, large = upscale(greyed(image), scale), upscale(image, scale)
    for row, column in np.argwhere(source != NOT_FOUND).tolist():
        place, number = _place((row, column), image, scale, source.shape), int(source[row, column])
        if number == COMMON_GROUND:
            marked[place] = large[place]
            continue
        color, _ = shown.get(number, (OTHER_COLOR, 0))
        marked[place] = framed(tinted(large[place], color), color, max(1, large[place].shape[1] // 12))
    return marked


def _changes(image: RGBImage, scale: int, moved: Float[np.ndarray, "H W"]) -> RGBImage:
    colored = upscale(greyed(image), scale)
    share = np.minimum(np.abs(moved) / max(_largest(np.abs(moved)), LEAST_RANGE), 1.0) * STRONGEST
    for row, column in np.argwhere(share > 0).tolist():
        place = _place((row, column), image, scale, moved.shape)
        color = ORANGE if moved[row, column] > 0 else BLUE
        colored[place] = tinted(colored[place], color, float(share[row, column]))
    return colored


def _largest(values: Float[np.ndarray, "H W"]) -> float:
    """The largest finite value; 0 if there is none."""
    return float(values[np.isfinite(values)].max(initial=0.0))


def _legend(
    shown: Shown, sources: Mapping[int, RGBImage], names: Mapping[int, str], source: Int[np.ndarray, "H W"], height: int
) -> RGBImage:
    """Thumbnails in their colour's frame with their cells and names, then the cells that are left."""
    frame, line, told = 3, text_size("Ag")[1] + 6, sum(count for _, count in shown.values())
    rest = [
        (OTHER_COLOR, f"other images: {int((source >= 0).sum()) - told}"),
        (PAPER, f"common ground (no frame): {int((source == COMMON_GROUND).sum())}"),
        ((200, 200, 200), f"no neighbour's code: {int((source == NOT_FOUND).sum())}"),
    ]
    free = height - line * len(rest)
    thumb = min(96, max(24, free // max(1, len(shown)) - 2 * frame - 6))
    step = thumb + 2 * frame + 6
    labels = [shortened(names[image], NAMES) for image in shown]
    wide = max(text_size(words)[0] for words in (*labels, *(words for _, words in rest)))
    canvas = Canvas(max(height, step * len(shown) + line * len(rest)), thumb + 2 * frame + 8 + wide)
    for rank, ((image, (color, count)), label) in enumerate(zip(shown.items(), labels, strict=True)):
        bordered = np.pad(fitted(sources[image], thumb), ((frame, frame), (frame, frame), (0, 0)))
        canvas.paste(0, rank * step, framed(bordered, color, frame))
        middle = rank * step + frame + thumb // 2
        canvas.text(thumb + 2 * frame + 8, middle - 1, f"{count} cell{'s' * (count != 1)}", "ld")
        canvas.text(thumb + 2 * frame + 8, middle + 1, label, "la", FAINT)
    for row, (color, words) in enumerate(rest):
        y = step * len(shown) + row * line
        canvas.paste(0, y + line // 2 - 6, framed(np.full((12, 12, 3), color, np.uint8), (200, 200, 200), 1))
        canvas.text(20, y + line // 2, words, "lm")
    return canvas.pixels()
