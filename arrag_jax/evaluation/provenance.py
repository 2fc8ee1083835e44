"""Where drawn pictures came from: a figure and a record a picture, from what the decode loop kept of each draw."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from arrag_jax.decode.loop import SampleOutput
from arrag_jax.decode.methods import METHODS
from arrag_jax.decode.policies import Daid, Faid
from arrag_jax.evaluation.memorization import copied_runs, equal_in_place
from arrag_jax.evaluation.origins import Origins, origins
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.provenance_page import COMMON_GROUND, NOT_FOUND, provenance_page
from arrag_jax.interfaces import DecodePolicy
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops.grid import image_and_position

THUMBNAILS = 5  # stored images shown beside a picture


def page_and_record(
    pipeline: Pipeline, method: str, prompt: str, image: UInt8[np.ndarray, "h w 3"], drawn: SampleOutput
) -> tuple[UInt8[np.ndarray, "_ _ 3"], dict[str, Any]]:
    """Returns the page of one picture (fields of ``drawn``: [T]), and its record.

    Thumbnails are the store's own codes decoded by the model, so that no original file is needed. Keys of a record:

      prompt, method: what was drawn.
      index: hash of the ScaNN index that was searched (``retrieval.index.index_hash``); empty where none was.
      share_retrieved: expected share of the draws that the retrieved distribution made, not the model (see
        ``share_of_draws``); null where nothing is mixed, as with FAiD alone.
      share_among_neighbors: share of the positions whose code is among the neighbours, whoever drew it.
      share_common: share of the positions whose code is there on common ground (see ``evaluation.origins``).
      share_copied: share of the positions that lie in a run that equals one stored image (``evaluation.memorization``),
        looked for in the images and at the displacements of the cells' neighbours, and in the image nearest in place.
      share_largest_copy: share of the cells in the largest of these runs.
      nearest_in_place: the stored image that equals the picture in most cells at the same place: "image", its number;
        "source", where it came from; "share_equal".
      sources: the images that hold most of the cells' patches, common ground aside, most first: "image", "source",
        "cells" shown as this image's, and "credit": its part of the cells when all equal patches share a cell alike.
      positions: one a cell in raster order. "code"; "rank" among the neighbours (0 = nearest), squared L2 "distance",
        stored "image" and "image_cell" of the nearest neighbour that holds the code, all null if none does. "copies":
        stored patches of the same context and code, in so many "images", of which the one named has most credit;
        "common": are these too many to tell anything? "retrieved": probability that retrieval made the draw, or null.
        "log_p" of the draw; "log_p_moved", less what it was before retrieval: null if the model never draws the code.
    """
    studied = _study(pipeline, method, prompt, drawn)
    record: dict[str, Any] = {"prompt": prompt, "method": method, "index": pipeline.index_hash(method)}
    record |= image_record(drawn, *studied)
    shown = [source["image"] for source in record["sources"]]
    origin = np.where(studied.origins.copies == 0, NOT_FOUND, studied.origins.image)
    origin = np.where(studied.origins.common, COMMON_GROUND, origin).reshape(pipeline.model.grid)
    moved = np.asarray(drawn.log_p - drawn.log_p_model).reshape(pipeline.model.grid)
    names = {number: studied.sources[number] for number in shown}
    mixed = studied.retrieved is not None
    page = provenance_page(image, origin, moved if mixed else None, _stored_images(pipeline, shown), names)
    return page, record


class Studied(NamedTuple):
    """What is known of a picture's cells beside what was drawn.

    Attributes:
      stored: codes of all stored images.
      sources: where they came from.
      origins: of the cells.
      retrieved: see ``share_of_draws``.
    """

    stored: Integer[np.ndarray, "n H W"]
    sources: Sequence[str]
    origins: Origins
    retrieved: Float[np.ndarray, " T"] | None


def _study(pipeline: Pipeline, method: str, prompt: str, drawn: SampleOutput) -> Studied:
    stored = pipeline.datastore.codes
    searched = pipeline.images_for(method, [prompt]) if METHODS[method].limited else None
    found = origins(np.asarray(drawn.source), stored, None if searched is None else searched[0])
    return Studied(stored, pipeline.datastore.sources, found, share_of_draws(drawn, pipeline.policy(method)))


def share_of_draws(drawn: SampleOutput, policy: DecodePolicy) -> Float[np.ndarray, "*n"] | None:
    """Returns each draw's probability to have come from the retrieved part of the mixture, not from the model's.

    A draw from p = (1 − λ) p_model + λ p_retrieved is one from either, by a coin of weight λ. Given the code c, the
    coin showed p_retrieved with probability λ p_retrieved(c) / p(c) = 1 − (1 − λ) p_model(c) / p(c): 0 when λ = 0, 1
    when λ = 1, and 0 in cells where nothing was mixed. FAiD's features act on p_model: no share of a draw is theirs.

    Args:
      drawn: fields of any shape.

    Returns:
      None for a policy that mixes nothing.
    """
    mixture = policy.mixture if isinstance(policy, Faid) else policy
    if not isinstance(mixture, Daid):
        return None
    kept = (1.0 - float(mixture.weight)) * np.exp(np.asarray(drawn.log_p_model, np.float64) - drawn.log_p)
    return np.where(np.asarray(drawn.rank) >= 0, np.clip(1.0 - kept, 0.0, 1.0), 0.0)


def image_record(
    drawn: SampleOutput,
    stored: Integer[np.ndarray, "n H W"],
    sources: Sequence[str],
    found: Origins | None = None,
    retrieved: Float[np.ndarray, " T"] | None = None,
) -> dict[str, Any]:
    """Returns the record of one picture (fields of ``drawn``: [T]), drawn from these stored images.

    Args:
      found: the origins; None = looked for in all images.
      retrieved: of ``share_of_draws``.

    See ``page_and_record`` for its keys.
    """
    height, width = stored.shape[1:]
    codes, rows = np.asarray(drawn.codes), np.asarray(drawn.source)
    found = origins(rows, stored) if found is None else found
    equal = equal_in_place(codes.reshape(height, width), stored)
    nearest = int(equal.argmax())
    runs = _runs(codes, *image_and_position(rows, height, width), nearest, stored)
    return {
        "share_retrieved": None if retrieved is None else round(float(retrieved.mean()), 4),
        "share_among_neighbors": round(float((found.copies > 0).mean()), 4),
        "share_common": round(float(found.common.mean()), 4),
        "share_copied": round(float(runs.any(0).mean()), 4),
        "share_largest_copy": round(float(runs.mean((1, 2)).max(initial=0.0)), 4),
        "nearest_in_place": {
            "image": nearest,
            "source": sources[nearest],
            "share_equal": round(float(equal[nearest] / found.copies.size), 4),
        },
        "sources": _most_credited(found, sources),
        "cells": [_cell(drawn, found, retrieved, position) for position in range(height * width)],
    }


def _most_credited(found: Origins, sources: Sequence[str]) -> list[dict[str, Any]]:
    """The images that most cells are shown as coming from."""
    images, positions = np.unique(found.image[(found.copies > 0) & ~found.common], return_counts=True)
    order = np.lexsort((images, -positions))[:THUMBNAILS]  # as the page has it
    return [
        {
            "image": int(images[place]),
            "source": sources[images[place]],
            "cells": int(positions[place]),
            "credit": round(float(found.credit[images[place]]), 4),
        }
        for place in order
    ]


def _cell(
    drawn: SampleOutput, found: Origins, retrieved: Float[np.ndarray, " T"] | None, position: int
) -> dict[str, Any]:
    held, moved = found.copies[position] > 0, drawn.log_p[position] - drawn.log_p_model[position]
    return {
        "code": int(drawn.codes[position]),
        "rank": int(drawn.rank[position]) if held else None,
        "distance": round(float(drawn.distance[position]), 6) if held else None,
        "image": int(found.image[position]) if held else None,
        "image_cell": int(found.position[position]) if held else None,
        "copies": int(found.copies[position]),
        "images": int(found.images[position]),
        "common": bool(found.common[position]),
        "retrieved": None if retrieved is None else round(float(retrieved[position]), 4),
        "log_p": round(float(drawn.log_p[position]), 4),
        "log_p_moved": round(float(moved), 4) if np.isfinite(moved) else None,
    }


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Returns the records' shares in one line, the mean over the pictures."""

    def mean(share: str) -> str:
        return f"{np.mean([record[share] for record in records]):.1%}"

    mixed = all(record["share_retrieved"] is not None for record in records)
    drawn = f"{mean('share_retrieved')} of the draws made by retrieval" if mixed else "no draw is mixed"
    return (
        f"{drawn}; {mean('share_among_neighbors')} of the codes are among the neighbours "
        f"({mean('share_common')} as common ground); {mean('share_copied')} lie in runs that equal a stored image, "
        f"{mean('share_largest_copy')} in the largest"
    )


def _runs(
    codes: Integer[np.ndarray, " T"],
    image: Integer[np.ndarray, " T"],
    position: Integer[np.ndarray, " T"],
    nearest: int,
    stored: Integer[np.ndarray, "n H W"],
) -> Bool[np.ndarray, "R H W"]:
    """A picture's runs from the images of its origins, at their displacements, and from the image nearest in place."""
    height, width = stored.shape[1:]
    here = np.flatnonzero(image >= 0)
    down, right = here // width - position[here] // width, here % width - position[here] % width
    looked_at = np.unique(np.stack([image[here], down, right], 1), axis=0)
    looked_at = np.concatenate([looked_at, [[nearest, 0, 0]]]).astype(np.int64)
    return copied_runs(codes.reshape(height, width), stored[looked_at[:, 0]], looked_at[:, 1:])


def _stored_images(pipeline: Pipeline, images: Sequence[int]) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """At most ``THUMBNAILS`` stored images, by number; decoded as a batch of just so many: one shape is compiled."""
    rows = np.resize(np.asarray(images, np.int64), THUMBNAILS)
    codes = pipeline.datastore.codes[rows].reshape(THUMBNAILS, -1).astype(np.int32)
    pictures = np.asarray(to_uint8(pipeline.model.decode_codes(codes, *pipeline.model.grid)))
    return dict(zip(images, pictures, strict=False))
