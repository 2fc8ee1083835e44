"""Figures in plain numpy and PIL: grids, where retrieved patches come from, heat maps, tables.

All pictures are uint8 [height, width, 3] on white. Small pictures are enlarged by whole factors without
smoothing, so that a figure's pixels are the model's. Colours are Okabe and Ito's ("Color Universal Design",
2008), which stay apart for colour-blind readers, and viridis for values.
"""

import functools
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "_ _ 3"]

# One colour a source image, most used first.
SOURCE_COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
OTHER_COLOR = (70, 70, 70)  # retrieved from a source outside the legend
INK, FAINT, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
MARGIN = 12  # pixels around and between the parts of a figure
FONT_SIZE = 14

# Viridis at equal steps; its luminance rises from end to end.
_VALUE_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
# PIL's own font holds little but ASCII.
_ASCII = dict(zip(map(ord, "λτ×−–—·’≤≥→"), ("lambda", "tau", *"x----'", "<=", ">=", "->"), strict=True))


def upscale(image: Picture, scale: int) -> Picture:
    """Every pixel becomes a square of ``scale`` x ``scale`` pixels."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def grid(images: UInt8[np.ndarray, "N h w 3"], columns: int, scale: int = 1, gap: int = 2) -> Picture:
    """N pictures in rows of ``columns``, ``gap`` white pixels apart; an unfilled last row stays white.

    Raises:
      ValueError: if there is no picture or no column.
    """
    count, height, width = images.shape[:3]
    if count < 1 or columns < 1:
        raise ValueError(f"a grid needs at least one picture and one column, got {count} and {columns}")
    rows, columns = -(-count // columns), min(columns, count)
    step_y, step_x = height * scale + gap, width * scale + gap
    canvas = np.full((rows * step_y - gap, columns * step_x - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step_y, i % columns * step_x
        canvas[y : y + height * scale, x : x + width * scale] = upscale(image, scale)
    return canvas


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Picture] | UInt8[np.ndarray, "_ _ _ 3"]]],
    column_titles: Sequence[str],
    scale: int = 2,
) -> Picture:
    """One row a prompt (wrapped, on the left), one column a method (its title on top).

    Args:
      rows: (prompt, one picture a column); all pictures of one size.
      column_titles: names of the methods.
      scale: whole factor by which pictures are enlarged.

    Raises:
      ValueError: if a row's number of pictures is not that of the titles, or sizes differ.
    """
    sizes = {image.shape for _, images in rows for image in images}
    counts = {len(images) for _, images in rows}
    if counts != {len(column_titles)} or len(sizes) != 1:
        raise ValueError(f"{len(column_titles)} titles need rows of as many pictures of one size: {counts}, {sizes}")
    height, width = (side * scale for side in sizes.pop()[:2])
    prompts = [_wrapped(prompt, 170) for prompt, _ in rows]
    titles = [_wrapped(title, width) for title in column_titles]
    label_width = max(_text_size(prompt)[0] for prompt in prompts)
    row_heights = [max(height, _text_size(prompt)[1]) for prompt in prompts]
    top = 2 * MARGIN + max(_text_size(title)[1] for title in titles)
    left = 2 * MARGIN + label_width
    canvas = _Canvas(top + sum(row_heights) + MARGIN * len(rows), left + (width + MARGIN) * len(titles))
    for column, title in enumerate(titles):
        canvas.text(left + column * (width + MARGIN) + width // 2, top - MARGIN, title, "md")
    y = top
    for (_, images), prompt, row_height in zip(rows, prompts, row_heights, strict=True):
        canvas.text(MARGIN, y + row_height // 2, prompt, "lm")
        for column, image in enumerate(images):
            canvas.paste(left + column * (width + MARGIN), y + (row_height - height) // 2, upscale(image, scale))
        y += row_height + MARGIN
    return canvas.pixels()


def provenance(
    image: UInt8[np.ndarray, "h w 3"],
    retrieved: Bool[np.ndarray, "H W"],
    source: Int[np.ndarray, "H W"],
    sources: Mapping[int, Picture],
    scale: int = 6,
    top: int = 5,
) -> Picture:
    """A drawn picture, the same with each cell's origin marked, and the stored images it drew from.

    A cell whose code was retrieved is framed and tinted in its source's colour; any other cell is greyed.
    The legend shows the ``top`` sources by number of cells (ties: the lower id), then what is left.

    Args:
      image: the drawn picture; its sides are multiples of the grid's.
      retrieved: was the code of this cell drawn from its neighbours?
      source: id of the stored image it was drawn from; -1 = none.
      sources: id → thumbnail, at least of the sources that the legend shows.
      scale: whole factor by which the picture is enlarged.
      top: sources in the legend, at most ``len(SOURCE_COLORS)``.

    Raises:
      ValueError: if the picture does not divide into the grid, ``top`` is too large, or a thumbnail is missing.
    """
    (height, width), (rows, columns) = image.shape[:2], retrieved.shape
    if height % rows or width % columns:
        raise ValueError(f"a {height} x {width} picture does not divide into {rows} x {columns} cells")
    if top > len(SOURCE_COLORS):
        raise ValueError(f"top={top} is more than the {len(SOURCE_COLORS)} colours that tell sources apart")
    ids, counts = np.unique(source[retrieved & (source >= 0)], return_counts=True)
    order = np.lexsort((ids, -counts))[:top]
    missing = [int(i) for i in ids[order] if int(i) not in sources]
    if missing:
        raise ValueError(f"no thumbnail of source images {missing}")
    shown = {int(ids[place]): (SOURCE_COLORS[rank], int(counts[place])) for rank, place in enumerate(order)}

    marked = upscale(_greyed(image), scale)
    large = upscale(image, scale)
    step_y, step_x = scale * height // rows, scale * width // columns
    for r, c in np.argwhere(retrieved):
        color, _ = shown.get(int(source[r, c]), (OTHER_COLOR, 0))
        place = np.s_[r * step_y : (r + 1) * step_y, c * step_x : (c + 1) * step_x]
        marked[place] = _framed(_tinted(large[place], color), color, max(1, step_x // 12))
    legend = _legend(shown, sources, int(retrieved.sum()), retrieved.size, large.shape[0])

    head = MARGIN + _text_size("Ag")[1] + MARGIN // 2
    panels = [("drawn", large), ("origin of each cell", marked), ("stored images drawn from", legend)]
    panel_height = max(panel.shape[0] for _, panel in panels)
    canvas = _Canvas(head + panel_height + MARGIN, MARGIN + sum(p.shape[1] + MARGIN for _, p in panels))
    x = MARGIN
    for title, panel in panels:
        canvas.text(x, head - MARGIN // 2, title, "ld")
        canvas.paste(x, head, panel)
        x += panel.shape[1] + MARGIN
    return canvas.pixels()


def _legend(
    shown: Mapping[int, tuple[tuple[int, int, int], int]],
    sources: Mapping[int, Picture],
    retrieved: int,
    cells: int,
    height: int,
) -> Picture:
    """Thumbnails in their colour's frame with their numbers of cells, then the cells that are left."""
    frame, line = 3, _text_size("Ag")[1] + 6
    rest = [
        (OTHER_COLOR, f"other images: {retrieved - sum(count for _, count in shown.values())}"),
        ((200, 200, 200), f"not retrieved: {cells - retrieved}"),
    ]
    free = height - line * len(rest)
    thumb = min(96, max(24, free // max(1, len(shown)) - 2 * frame - 6))
    step = thumb + 2 * frame + 6
    canvas = _Canvas(max(height, step * len(shown) + line * len(rest)), max(200, thumb + 120))
    for rank, (source, (color, count)) in enumerate(shown.items()):
        bordered = np.pad(_fitted(sources[source], thumb), ((frame, frame), (frame, frame), (0, 0)))
        canvas.paste(0, rank * step, _framed(bordered, color, frame))
        middle = rank * step + frame + thumb // 2
        canvas.text(thumb + 2 * frame + 8, middle - 1, f"{count} cell{'s' * (count != 1)}", "ld")
        canvas.text(thumb + 2 * frame + 8, middle + 1, f"image {source}", "la", FAINT)
    for row, (color, words) in enumerate(rest):
        y = step * len(shown) + row * line
        canvas.paste(0, y + line // 2 - 6, np.full((12, 12, 3), color, np.uint8))
        canvas.text(20, y + line // 2, words, "lm")
    return canvas.pixels()


def heat_map(
    values: Float[np.ndarray, "R C"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    row_name: str = "",
    column_name: str = "",
    form: str = "{:.2f}",
) -> Picture:
    """A table of numbers, each cell coloured by its value: dark is the smallest, bright the largest.

    Args:
      values: the numbers; NaN = not measured, drawn as an empty grey cell.
      row_labels: one a row, written on the left.
      column_labels: one a column, written on top.
      title: stands above the table.
      row_name: what the row labels count; stands in the corner.
      column_name: what the column labels count; stands above them.
      form: how a number is written.

    Raises:
      ValueError: if the labels' numbers are not the table's.
    """
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"{values.shape} values do not fit {len(row_labels)} x {len(column_labels)} labels")
    values = values.astype(np.float64)
    line = _text_size("Ag")[1] + 6
    texts = [[form.format(value) if np.isfinite(value) else "" for value in row] for row in values]
    cell_width = max(_text_size(text)[0] for text in (*np.ravel(texts), *column_labels)) + 18
    left = MARGIN + max(_text_size(text)[0] for text in (*row_labels, row_name)) + 8
    top = MARGIN + line * (1 + bool(title) + bool(column_name))
    cell_height = line + 12
    width = max(cell_width * values.shape[1], _text_size(title)[0], _text_size(column_name)[0])
    canvas = _Canvas(top + cell_height * values.shape[0] + MARGIN, left + width + MARGIN)
    middle = left + cell_width * values.shape[1] // 2
    canvas.text(left, MARGIN, title, "la")
    canvas.text(middle, top - line - 6, column_name, "md", FAINT)
    canvas.text(left - 8, top - 6, row_name, "rd", FAINT)
    for c, label in enumerate(column_labels):
        canvas.text(left + c * cell_width + cell_width // 2, top - 6, label, "md")
    for r, label in enumerate(row_labels):
        y = top + r * cell_height
        canvas.text(left - 8, y + cell_height // 2, label, "rm")
        for c, text in enumerate(texts[r]):
            color = value_color(values[r, c], np.nanmin(values), np.nanmax(values))
            x = left + c * cell_width
            canvas.paste(x, y, np.full((cell_height - 1, cell_width - 1, 3), color, np.uint8))
            canvas.text(x + cell_width // 2, y + cell_height // 2, text, "mm", INK if luminance(color) > 120 else PAPER)
    return canvas.pixels()


def value_color(value: float, low: float, high: float) -> tuple[int, int, int]:
    """The colour of a value between ``low`` (dark) and ``high`` (bright); light grey for NaN."""
    if not np.isfinite(value):
        return (225, 225, 225)
    place = (value - low) / (high - low) if high > low else 0.5
    steps = np.linspace(0, 1, len(_VALUE_COLORS))
    return tuple(round(float(np.interp(place, steps, channel))) for channel in _VALUE_COLORS.T)


def luminance(color: Sequence[int]) -> float:
    """Perceived brightness of an sRGB colour, 0 to 255 (Rec. 601)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 3) -> str:
    """A Markdown table that also reads well as plain text; numbers stand on the right.

    Args:
      columns: the head.
      rows: cells; floats are written with ``digits`` decimals, None as an empty cell.
      digits: decimals of floats.

    Raises:
      ValueError: if a row has another number of cells than the head.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} columns: {row}")
    cells = [[_cell(value, digits) for value in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[c]) for row in cells)) for c in range(len(columns))]
    right = [bool(rows) and all(isinstance(row[c], int | float | None) for row in rows) for c in range(len(columns))]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    padded = [
        [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(row, widths, right, strict=True)]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _cell(value: object, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value).replace("|", "\\|")


class _Canvas:
    """A white page to which pixels and text are added."""

    def __init__(self, height: int, width: int):
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def paste(self, x: int, y: int, pixels: np.ndarray) -> None:
        self._image.paste(Image.fromarray(pixels), (x, y))

    def text(self, x: int, y: int, words: str, anchor: str, color: tuple[int, int, int] = INK) -> None:
        """Writes ``words`` so that their box's ``anchor`` (l/m/r, then a/m/d = top/middle/bottom) is at (x, y)."""
        words, (width, height) = _printable(words), _text_size(words)
        x -= {"l": 0, "m": width // 2, "r": width}[anchor[0]]
        y -= {"a": 0, "m": height // 2, "d": height}[anchor[1]]
        align = {"l": "left", "m": "center", "r": "right"}[anchor[0]]
        self._draw.multiline_text((x, y), words, color, _font(), align=align, spacing=2)

    def pixels(self) -> Picture:
        return np.array(self._image)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)  # comes with PIL, so figures look the same everywhere


def _printable(words: str) -> str:
    """The text in letters that the font has; a letter without a near one becomes "?"."""
    parts = unicodedata.normalize("NFKD", words.translate(_ASCII))
    return "".join(c for c in parts if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _text_size(words: str) -> tuple[int, int]:
    """(width, height) in pixels of the box of a text; every line has the same height."""
    lines = _printable(words).split("\n")
    ascent, descent = _font().getmetrics()
    return round(max(_font().getlength(line) for line in lines)), len(lines) * (ascent + descent + 2) - 2


def _wrapped(words: str, width: int) -> str:
    """The text in lines of at most ``width`` pixels, as far as its words allow."""
    letters = max(1, int(width / (_font().getlength("abcdefghij klmnop") / 17)))
    return "\n".join(textwrap.wrap(words, letters, break_long_words=False)) or " "


def _fitted(image: Picture, side: int) -> Picture:
    """Enlarged or shrunk by the whole factor that brings its longer side nearest below ``side`` pixels."""
    longest = max(image.shape[:2])
    if longest <= side:
        return upscale(image, side // longest)
    return np.array(Image.fromarray(image).reduce(-(-longest // side)))


def _greyed(image: Picture) -> Picture:
    """Without colour and paler, so that coloured cells stand out."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return np.broadcast_to((110 + 0.55 * grey)[..., None], image.shape).astype(np.uint8)


def _tinted(image: Picture, color: tuple[int, int, int]) -> Picture:
    return (0.75 * image + 0.25 * np.array(color)).astype(np.uint8)


def _framed(image: Picture, color: tuple[int, int, int], frame: int) -> Picture:
    """The same with its outermost ``frame`` pixels in ``color``."""
    framed = np.empty_like(image)
    framed[:] = color
    framed[frame:-frame, frame:-frame] = image[frame:-frame, frame:-frame]
    return framed
