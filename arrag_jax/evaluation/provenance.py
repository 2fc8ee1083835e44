"""The origins of generated images: a figure and a record per image, computed from the output of the decode loop."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from arrag_jax.decode.loop import SampleOutput
from arrag_jax.decode.methods import METHODS
from arrag_jax.decode.policies import mixture_of
from arrag_jax.evaluation.memorization import copied_runs, equal_in_place
from arrag_jax.evaluation.origins import Origins, origins
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.provenance_page import COMMON_GROUND, NOT_FOUND, provenance_page
from arrag_jax.interfaces import DecodePolicy
from arrag_jax.nn.vq import to_uint8
from arrag_jax.ops.grid import image_and_position

THUMBNAILS = 5  # number of stored images on a page


def page_and_record(
    pipeline: Pipeline, method: str, prompt: str, image: UInt8[np.ndarray, "h w 3"], drawn: SampleOutput
) -> tuple[UInt8[np.ndarray, "_ _ 3"], dict[str, Any]]:
    """Returns the page and the record of one image (fields of ``drawn``: [T]).

    The model decodes the thumbnails from the stored codes, so no original image file is needed. Keys of a record:

      prompt, method: inputs of the image.
      index: hash of the searched ScaNN index (``retrieval.index.index_hash``); empty if none was searched.
      share_retrieved: expected share of the codes that were sampled from the retrieved distribution, not from the
        model's (see ``share_of_draws``); null if the method mixes nothing, such as FAiD alone.
      share_among_neighbors: share of the positions whose code is among the neighbours, whichever distribution it was
        sampled from.
      share_common: share of the positions whose code is among them on common ground (see ``evaluation.origins``).
      share_copied: share of the positions in a run that equals one stored image (``evaluation.memorization``). Runs are
        searched in the images and at the displacements of the neighbours, and in the image nearest in place.
      share_largest_copy: share of the positions in the largest of these runs.
      nearest_in_place: the stored image that equals the generated one at most positions: "image", its number; "source",
        its origin; "share_equal", the share of equal positions.
      sources: the images with the most positions, common ground excluded, in descending order: "image"; "source";
        "cells", the number of positions shown as this image's; and "credit", its part of the positions when all equal
        patches share a position equally.
      cells: one item per position in raster order. "code"; "rank" among the neighbours (0 = nearest), squared L2
        "distance", stored "image" and "image_cell" of the nearest neighbour with this code, all null if there is none.
        "copies": number of stored patches with the same context and code, in "images" different images; "image" is the
        one of them with the most credit. "common": whether these are too many to be informative. "retrieved":
        probability that the code was sampled from the retrieved distribution, or null. "weight": the share λ of the
        retrieved distribution at the position. "log_p" of the code;
        "log_p_moved", the same minus its value before retrieval, null if the model alone never samples the code.
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
    page = provenance_page(image, origin, moved if mixed else None, stored_images(pipeline, method, shown), names)
    return page, record


class Studied(NamedTuple):
    """Facts about an image's positions in addition to the sampled codes.

    Attributes:
      stored: codes of all stored images.
      sources: origins of the stored images.
      origins: origins of the positions.
      retrieved: see ``share_of_draws``.
    """

    stored: Integer[np.ndarray, "n H W"]
    sources: Sequence[str]
    origins: Origins
    retrieved: Float[np.ndarray, " T"] | None


def _study(pipeline: Pipeline, method: str, prompt: str, drawn: SampleOutput) -> Studied:
    store = pipeline.search_of(method).store
    searched = pipeline.images_for(method, [prompt]) if METHODS[method].limited else None
    found = origins(np.asarray(drawn.source), store.shown_codes, None if searched is None else searched[0])
    return Studied(store.shown_codes, store.sources, found, share_of_draws(drawn, pipeline.policy(method)))


def share_of_draws(drawn: SampleOutput, policy: DecodePolicy) -> Float[np.ndarray, "*n"] | None:
    """Returns the probability that each code was sampled from the retrieved part of the mixture, not from the model's.

    Sampling from p = (1 − λ) p_model + λ p_retrieved is the same as choosing p_retrieved with probability λ, p_model
    otherwise, and sampling from the chosen one. Given the code c, p_retrieved was chosen with probability
    λ p_retrieved(c) / p(c) = 1 − (1 − λ) p_model(c) / p(c). This is 0 if λ = 0, 1 if λ = 1, and 0 at positions without
    a mixture. FAiD's features change p_model itself, so they have no share of their own.

    Args:
      drawn: fields of any shape.

    Returns:
      None for a policy that mixes nothing.
    """
    mixture = mixture_of(policy)
    if mixture is None:
        return None
    moved = np.asarray(drawn.log_p_model, np.float64) - drawn.log_p
    weight = mixture.weight if drawn.weight is None else drawn.weight  # a gate's weight differs between positions
    kept = (1.0 - np.asarray(weight, np.float64)) * np.exp(moved)
    return np.where(np.asarray(drawn.rank) >= 0, np.clip(1.0 - kept, 0.0, 1.0), 0.0)


def image_record(
    drawn: SampleOutput,
    stored: Integer[np.ndarray, "n H W"],
    sources: Sequence[str],
    found: Origins | None = None,
    retrieved: Float[np.ndarray, " T"] | None = None,
) -> dict[str, Any]:
    """Returns the record of one image (fields of ``drawn``: [T]) that was generated with these stored images.

    Args:
      found: the origins; None = they are searched in all images.
      retrieved: result of ``share_of_draws``.

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
    """Returns the images that are shown as the origin of the most positions."""
    images, counts = np.unique(found.image[(found.copies > 0) & ~found.common], return_counts=True)
    order = np.lexsort((images, -counts))[:THUMBNAILS]  # the same order as on the page
    return [
        {
            "image": int(images[place]),
            "source": sources[images[place]],
            "cells": int(counts[place]),
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
        "weight": None if drawn.weight is None else round(float(drawn.weight[position]), 4),
        "log_p": round(float(drawn.log_p[position]), 4),
        "log_p_moved": round(float(moved), 4) if np.isfinite(moved) else None,
    }


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Returns one line with the means of the records' shares over the images."""

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
    """Returns an image's runs of copied codes.

    They are searched in the images and at the displacements of its neighbours, and in the image nearest in place.
    """
    height, width = stored.shape[1:]
    here = np.flatnonzero(image >= 0)
    down, right = here // width - position[here] // width, here % width - position[here] % width
    looked_at = np.unique(np.stack([image[here], down, right], 1), axis=0)
    looked_at = np.concatenate([looked_at, [[nearest, 0, 0]]]).astype(np.int64)
    return copied_runs(codes.reshape(height, width), stored[looked_at[:, 0]], looked_at[:, 1:])


def stored_columns(
    pipeline: Pipeline, method: str, credited: Sequence[Sequence[int]], count: int
) -> list[list[UInt8[np.ndarray, "h w 3"]]]:
    """Returns ``count`` columns with the first stored images of each row; a row with fewer images ends in white ones.

    Args:
      credited: numbers of stored images, by row.
    """
    white = np.full((*pipeline.model.image_size, 3), 255, np.uint8)
    rows = []
    for numbers in credited:
        images = list(stored_images(pipeline, method, numbers[:count]).values()) if numbers else []
        rows.append([*images, *[white] * (count - len(images))])
    return [list(column) for column in zip(*rows, strict=True)]


def stored_images(pipeline: Pipeline, method: str, images: Sequence[int]) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """Returns at most ``THUMBNAILS`` stored images by number.

    The batch is padded to this size, so that only one shape is compiled.
    """
    rows = np.resize(np.asarray(images, np.int64), THUMBNAILS)
    codes = pipeline.search_of(method).store.codes[rows].reshape(THUMBNAILS, -1).astype(np.int32)
    pictures = np.asarray(to_uint8(pipeline.model.decode_codes(codes, *pipeline.model.grid)))
    return dict(zip(images, pictures, strict=False))
