"""Where drawn pictures came from: a figure and a record a picture, from what the decode loop kept of each draw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from arrag_jax.decode.loop import Drawn
from arrag_jax.evaluation.copies import copied_runs, equal_in_place
from arrag_jax.evaluation.drawing import Studio
from arrag_jax.evaluation.provenance_page import provenance_page
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops.grid import image_and_cell

THUMBNAILS = 5  # stored images shown beside a picture


def page_and_record(
    studio: Studio, method: str, prompt: str, image: UInt8[np.ndarray, "h w 3"], drawn: Drawn
) -> tuple[UInt8[np.ndarray, "_ _ 3"], dict[str, Any]]:
    """Returns the page of one picture (fields of ``drawn``: [T]), and its record.

    Thumbnails are the store's own codes decoded by the model, so that no original file is needed. Keys of a record:

      prompt, method: what was drawn.
      index: hash of the ScaNN index that was searched (``retrieval.index.index_hash``); empty where none was.
      share_retrieved: share of the cells whose code was among the retrieved.
      share_copied: share of the cells that lie in a run from one stored image (``evaluation.copies``), looked for in
        the images and at the displacements of the cells' origins, and in the image nearest in place.
      share_largest_copy: share of the cells in the largest of these runs.
      nearest_in_place: the stored image that equals the picture in most cells at the same place: "image", its number;
        "source", where it came from; "share_equal".
      sources: the images most codes came from, most first: "image", "source", "cells".
      cells: one a cell in raster order. "code"; "rank" among the retrieved (0 = nearest), squared L2 "distance",
        stored "image" and "image_cell" of the nearest neighbour that holds the code, all null if none does;
        "log_p" of the draw; "log_p_moved", less what it was before retrieval: null if the model never draws the code.
    """
    record = {"prompt": prompt, "method": method, "index": studio.index_hash(method)}
    record |= picture_record(drawn, studio.store.codes, studio.store.sources)
    thumbnails = _stored_pictures(studio, [source["image"] for source in record["sources"]])
    origin, _ = image_and_cell(drawn.source, *studio.model.grid)
    maps = (x.reshape(studio.model.grid) for x in (origin, drawn.log_p - drawn.log_p_model))
    return provenance_page(image, *maps, thumbnails, top=THUMBNAILS), record


def picture_record(drawn: Drawn, stored: Integer[np.ndarray, "n H W"], sources: Sequence[str]) -> dict[str, Any]:
    """The record of one picture (fields of ``drawn``: [T]), drawn from these stored images; see ``page_and_record``."""
    height, width = stored.shape[1:]
    image, cell = image_and_cell(drawn.source, height, width)
    found, moved = image >= 0, drawn.log_p - drawn.log_p_model
    ids, counts = np.unique(image[found], return_counts=True)
    equal = equal_in_place(drawn.codes.reshape(height, width), stored)
    nearest = int(equal.argmax())
    runs = _runs(drawn.codes, image, cell, nearest, stored)
    cells = [
        {
            "code": int(drawn.codes[t]),
            "rank": int(drawn.rank[t]) if found[t] else None,
            "distance": round(float(drawn.distance[t]), 6) if found[t] else None,
            "image": int(image[t]) if found[t] else None,
            "image_cell": int(cell[t]) if found[t] else None,
            "log_p": round(float(drawn.log_p[t]), 4),
            "log_p_moved": round(float(moved[t]), 4) if np.isfinite(moved[t]) else None,
        }
        for t in range(height * width)
    ]
    return {
        "share_retrieved": round(float(found.mean()), 4),
        "share_copied": round(float(runs.any(0).mean()), 4),
        "share_largest_copy": round(float(runs.mean((1, 2)).max(initial=0.0)), 4),
        "nearest_in_place": {
            "image": nearest,
            "source": sources[nearest],
            "share_equal": round(float(equal[nearest] / found.size), 4),
        },
        "sources": [
            {"image": int(ids[place]), "source": sources[ids[place]], "cells": int(counts[place])}
            for place in np.lexsort((ids, -counts))[:THUMBNAILS]
        ],
        "cells": cells,
    }


def summary(records: Sequence[dict[str, Any]]) -> str:
    """The records' shares in one line, the mean over the pictures."""
    means = [
        np.mean([record[share] for record in records])
        for share in ("share_retrieved", "share_copied", "share_largest_copy")
    ]
    return "{:.1%} of the codes retrieved, {:.1%} in runs from one stored image, {:.1%} in the largest".format(*means)


def _runs(
    codes: Integer[np.ndarray, " T"],
    image: Integer[np.ndarray, " T"],
    cell: Integer[np.ndarray, " T"],
    nearest: int,
    stored: Integer[np.ndarray, "n H W"],
) -> Bool[np.ndarray, "R H W"]:
    """A picture's runs from the images of its origins, at their displacements, and from the image nearest in place."""
    height, width = stored.shape[1:]
    here = np.flatnonzero(image >= 0)
    down, right = here // width - cell[here] // width, here % width - cell[here] % width
    looked_at = np.unique(np.stack([image[here], down, right], 1), axis=0)
    looked_at = np.concatenate([looked_at, [[nearest, 0, 0]]]).astype(np.int64)
    return copied_runs(codes.reshape(height, width), stored[looked_at[:, 0]], looked_at[:, 1:])


def _stored_pictures(studio: Studio, images: Sequence[int]) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """At most ``THUMBNAILS`` stored images, by number; decoded as a batch of just so many: one shape is compiled."""
    rows = np.resize(np.asarray(images, np.int64), THUMBNAILS)
    codes = studio.store.codes[rows].reshape(THUMBNAILS, -1).astype(np.int32)
    pictures = np.asarray(to_uint8(studio.model.decode_codes(codes, *studio.model.grid)))
    return dict(zip(images, pictures, strict=False))
