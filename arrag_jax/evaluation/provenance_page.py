"""The figure that shows the origins of one generated image, as panels side by side."""

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

NOT_FOUND, COMMON_GROUND = -1, -2  # special values in ``source``
OTHER_COLOR = (70, 70, 70)  # for stored images that are not in the legend
STRONGEST = 0.75  # share of the colour at the largest effect of retrieval
LEAST_RANGE = 0.1  # of log p: smaller changes stay pale, even if they are the largest in the image
PANEL = 288  # pixels; smaller images are enlarged to at most this side
NAMES = 210  # maximum width in pixels of the name of a stored image


def provenance_page(
    image: UInt8[np.ndarray, "h w 3"],
    source: Int[np.ndarray, "H W"],
    moved: Float[np.ndarray, "H W"] | None,
    sources: Mapping[int, RGBImage],
    names: Mapping[int, str],
    scale: int | None = None,
    top: int = 5,
) -> RGBImage:
    """Returns a figure with up to four panels: the image, its origins, the effect of retrieval, the stored images.

    Origins: a position whose patch a stored image holds is framed and tinted in that image's colour. Common ground,
    which very many images hold, keeps its own colours without a frame. A position whose code no neighbour holds is
    grey.

    Effect: orange where retrieval made the sampled code more likely, blue where it made it less likely. The
    strongest colour stands for the largest finite change in the image (at least ``LEAST_RANGE``), and for codes that
    the model alone could not have sampled.

    The legend shows the ``top`` sources by number of positions (ties: the lower id), then the number of the
    remaining positions.

    Args:
      image: the generated image; its sides are multiples of the grid's sides.
      source: id of the stored image shown as the origin of each position, or ``NOT_FOUND`` or ``COMMON_GROUND``.
      moved: log-probability of each sampled code minus its value before retrieval; +inf: the model could not have
        sampled it. None: the method mixes no distributions, and this panel is left out.
      sources: id → thumbnail, at least for the sources in the legend.
      names: id → the name of that image's source, likewise; long names are shortened in the middle.
      scale: integer factor by which the image is enlarged; None = the largest one up to ``PANEL`` pixels.
      top: number of sources in the legend, at most ``len(PALETTE)``.

    Raises:
      ValueError: if the image does not divide into the grid, ``top`` is too large, or a thumbnail is missing.
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
    """Returns the smallest and the largest change, including zero, as text with two digits."""
    return f"{min(0.0, float(moved.min())):.2g} to {max(0.0, float(moved.max())):+.2g}"


Shown = Mapping[int, tuple[tuple[int, int, int], int]]  # source image → its colour and number of positions


def _most_used(source: Int[np.ndarray, "H W"], top: int) -> Shown:
    ids, counts = np.unique(source[source >= 0], return_counts=True)
    order = np.lexsort((ids, -counts))[:top]
    return {int(ids[place]): (PALETTE[rank], int(counts[place])) for rank, place in enumerate(order)}


def _place(position: tuple[int, int], image: RGBImage, scale: int, grid: tuple[int, int]) -> tuple[slice, slice]:
    """Returns the pixels of a position in the enlarged image."""
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
    """Returns the largest finite value; 0 if there is none."""
    return float(values[np.isfinite(values)].max(initial=0.0))


def _legend(
    shown: Shown, sources: Mapping[int, RGBImage], names: Mapping[int, str], source: Int[np.ndarray, "H W"], height: int
) -> RGBImage:
    """Returns the framed thumbnails with their counts and names, then the counts of the remaining positions."""
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
