"""Decides which images are the same.

Two images from files are the same if their grids of codes and their captions are equal. Equal grids have equal keys and
equal next codes, so that the second one only adds weight to a search. Images with another caption are different,
because a search can find them by the caption. Two images of data sets are the same if their ids are equal: a generated
data set may hold equal scenes on purpose.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt16, UInt64

from arrag_jax.store.datastore import Datastore

CHUNK = 16_384  # grids read per call


def digests(codes: UInt16[np.ndarray, "n H W"], captions: Sequence[str] | None) -> UInt64[np.ndarray, " n"]:
    """Returns a 64-bit hash of each grid and its caption.

    Among 10^7 images, two different ones share a hash in about one of 10^5 stores.
    """
    words = [""] * len(codes) if captions is None else captions
    return _hashes(grid.astype("<u2").tobytes() + word.encode() for grid, word in zip(codes, words, strict=True))


def _hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, " n"]:
    """Returns a 64-bit hash of each item."""
    found = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def digests_of(segment: Datastore) -> UInt64[np.ndarray, " n"]:
    """Returns the hash that identifies each image of a store without segments.

    It is the hash of the id for a data set's images, else of the content.
    """
    if segment.settings.split:  # only data sets have splits
        return _hashes(f"id:{id_}".encode() for id_ in segment.sources)
    captions = segment.captions if segment.settings.captions else None

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, segment.num_images, CHUNK):
            end = min(first + CHUNK, segment.num_images)
            yield digests(segment.codes_of(first, end), None if captions is None else captions[first:end])

    return np.concatenate([np.zeros(0, np.uint64), *chunks()])


class KnownContents:
    """The contents (hashes) that a store holds already, each with the name of its image."""

    def __init__(self, contents: UInt64[np.ndarray, " n"], names: Sequence[str]):
        order = np.argsort(contents, kind="stable")
        self.contents, self.numbers, self.names = contents[order], order, names

    def find(self, contents: UInt64[np.ndarray, " n"]) -> list[str | None]:
        """Returns for each content the name of the first image that has it, or None if no image has it."""
        if not len(self.contents):
            return [None] * len(contents)
        places = np.minimum(np.searchsorted(self.contents, contents), len(self.contents) - 1)
        found = self.contents[places] == contents
        return [self.names[self.numbers[i]] if hit else None for i, hit in zip(places, found, strict=True)]


def contents_of_files(store: Datastore) -> KnownContents:
    """Returns the contents of all images of a store and its segments that came from files."""
    wholes = [x for x in store.wholes if not x.settings.split]
    contents = [np.zeros(0, np.uint64), *map(digests_of, wholes)]
    return KnownContents(np.concatenate(contents), [id_ for segment in wholes for id_ in segment.sources])
