"""Draws code grids row by row: for progress bars, pictures that appear while they form, and drawings that stop."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from arrag_jax.decode.loop import Prepared, SampleOutput, prepare
from arrag_jax.interfaces import AnyRetriever, ArrayLike, Backbone, DecodePolicy, ImageTokenizer
from arrag_jax.nn.vq import to_uint8

BLANK = 235  # grey level of pixels that are not drawn yet


def sample_stream(
    model: Backbone,
    condition: ArrayLike,
    policy: DecodePolicy | None = None,
    retriever: AnyRetriever | None = None,
    **settings: Any,
) -> Iterator[SampleOutput]:
    """Draws as ``sample`` does, and yields each row of the grids when it is drawn, as numpy arrays [B, W, ...].

    ``joined`` of all rows is what ``sample`` returns for the same arguments. No row is begun before it is asked for, so
    a drawing stops when the caller asks for no more. The arguments are checked at once.

    Args:
      model, condition, policy, retriever, settings: the arguments of ``decode.loop.sample``.
    """
    return _rows(prepare(model, condition, policy, retriever, **settings))


def _rows(prepared: Prepared) -> Iterator[SampleOutput]:
    width = prepared.grid[1]
    for start in range(0, int(np.prod(prepared.grid)), width):
        prepared = prepared.until(start + width)
        row = slice(start, start + width)
        yield jax.tree.map(lambda x, row=row: np.array(np.asarray(x)[:, row]), prepared.out())  # drawn on in place


def joined(rows: Sequence[SampleOutput]) -> SampleOutput:
    """Returns consecutive rows of the same grids as one output."""
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *rows)


def partial_images(model: ImageTokenizer, codes: Int[np.ndarray, "B _"]) -> UInt8[np.ndarray, "B h w 3"]:
    """Returns the images of grids of which only the first rows are drawn; what is not drawn yet is grey.

    A complete grid gives the image itself, decoded in a batch of B.

    Args:
      codes: the rows drawn so far, at least one.
    """
    (height, width), drawn = model.grid, codes.shape[1]
    rows = drawn // width
    # The tokenizer sees the last row again and again below: grids of one size need only one compiled program.
    filled = np.concatenate([codes, np.tile(codes[:, drawn - width :], (1, height - rows))], axis=1)
    images = np.array(to_uint8(model.decode_codes(jnp.asarray(filled), height, width)))
    images[:, rows * images.shape[1] // height :] = BLANK
    return images
