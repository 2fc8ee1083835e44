"""Draws grids of images and heat maps with numpy and PIL, and formats Markdown tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax.figures.canvas import (
    FAINT,
    INK,
    MARGIN,
    PAPER,
    Canvas,
    RGBImage,
    luminance,
    upscale,
    value_color,
)
from arrag_jax.figures.lettering import text_size, wrapped
from arrag_jax.files import atomic_write


def save(path: Path, picture: RGBImage, info: PngInfo | None = None) -> None:
    """Writes a PNG with its text chunks, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=info)


def grid(images: UInt8[np.ndarray, "N h w 3"], columns: int, scale: int = 1, gap: int = 2) -> RGBImage:
    """Returns N images in rows of ``columns`` images, ``gap`` white pixels apart; an unused rest stays white.

    Raises:
      ValueError: if there is no image or no column.
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
    rows: Sequence[tuple[str, Sequence[RGBImage] | UInt8[np.ndarray, "_ _ _ 3"]]],
    column_titles: Sequence[str],
    scale: int = 2,
) -> RGBImage:
    """Returns a grid with one row per prompt and one column per method; prompts are on the left, titles on top.

    Args:
      rows: pairs of a prompt and its images, one image per column; all images have the same size.
      column_titles: names of the methods.
      scale: integer factor by which images are enlarged.

    Raises:
      ValueError: if a row does not have one image per title, or the image sizes differ.
    """
    sizes = {image.shape for _, images in rows for image in images}
    counts = {len(images) for _, images in rows}
    if counts != {len(column_titles)} or len(sizes) != 1:
        raise ValueError(f"{len(column_titles)} titles need rows of as many images of one size: {counts}, {sizes}")
    height, width = (side * scale for side in sizes.pop()[:2])
    prompts = [wrapped(prompt, 170) for prompt, _ in rows]
    titles = [wrapped(title, width) for title in column_titles]
    label_width = max(text_size(prompt)[0] for prompt in prompts)
    row_heights = [max(height, text_size(prompt)[1]) for prompt in prompts]
    top = 2 * MARGIN + max(text_size(title)[1] for title in titles)
    left = 2 * MARGIN + label_width
    canvas = Canvas(top + sum(row_heights) + MARGIN * len(rows), left + (width + MARGIN) * len(titles))
    for column, title in enumerate(titles):
        canvas.text(left + column * (width + MARGIN) + width // 2, top - MARGIN, title, "md")
    y = top
    for (_, images), prompt, row_height in zip(rows, prompts, row_heights, strict=True):
        canvas.text(MARGIN, y + row_height // 2, prompt, "lm")
        for column, image in enumerate(images):
            canvas.paste(left + column * (width + MARGIN), y + (row_height - height) // 2, upscale(image, scale))
        y += row_height + MARGIN
    return canvas.pixels()


def heat_map(
    values: Float[np.ndarray, "R C"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    row_name: str = "",
    column_name: str = "",
    form: str = "{:.2f}",
) -> RGBImage:
    """Returns a table of numbers as an image; the colour of a cell shows its value, from dark (smallest) to bright.

    Args:
      values: the numbers; NaN = not measured, drawn as an empty grey cell.
      row_labels: one label per row, on the left.
      column_labels: one label per column, on top.
      title: text above the table.
      row_name: name of the quantity in the row labels, in the corner.
      column_name: name of the quantity in the column labels, above them.
      form: format string of a number.

    Raises:
      ValueError: if the numbers of labels do not match the shape of ``values``.
    """
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"{values.shape} values do not fit {len(row_labels)} x {len(column_labels)} labels")
    values = values.astype(np.float64)
    line = text_size("Ag")[1] + 6
    texts = [[form.format(value) if np.isfinite(value) else "" for value in row] for row in values]
    cell_width = max(text_size(text)[0] for text in (*np.ravel(texts), *column_labels)) + 18
    left = MARGIN + max(text_size(text)[0] for text in (*row_labels, row_name)) + 8
    top = MARGIN + line * (1 + bool(title) + bool(column_name))
    cell_height = line + 12
    width = max(cell_width * values.shape[1], text_size(title)[0], text_size(column_name)[0])
    canvas = Canvas(top + cell_height * values.shape[0] + MARGIN, left + width + MARGIN)
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


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 3) -> str:
    """Returns a Markdown table whose columns are also aligned as plain text; numbers are aligned to the right.

    Args:
      columns: titles of the columns.
      rows: the cells of each row; None is an empty cell.
      digits: decimals of floats.

    Raises:
      ValueError: if a row does not have one cell per column.
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
