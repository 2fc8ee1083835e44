"""Which images are the same: by content, which for a store is the grid of codes and the caption.

Equal grids give equal keys and equal next codes, so that a second one adds nothing to a search but its weight. Images
of one caption and one grid are the same image; with another caption they are not, because they are found by it.
Content counts among images of files alone. A data set's images have numbers for names, and a generated one may hold
equal scenes on purpose: among those the name decides.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt16, UInt64

from arrag_jax.store.datastore import Datastore

CHUNK = 16_384  # grids read at once


def digests(codes: UInt16[np.ndarray, "n H W"], captions: Sequence[str] | None) -> UInt64[np.ndarray, " n"]:
    """Returns 64 bits of a hash of each grid and its caption; 10^7 images agree by chance once in 10^5 stores."""
    words = [""] * len(codes) if captions is None else captions
    return _hashes(grid.astype("<u2").tobytes() + word.encode() for grid, word in zip(codes, words, strict=True))


def _hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, " n"]:
    """64 bits of a hash of each."""
    found = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def digests_of(segment: Datastore) -> UInt64[np.ndarray, " n"]:
    """Returns what tells the images of a store without segments apart: hashes of a data set's ids, else of contents."""
    if segment.settings.split:  # which files have none of
        return _hashes(f"id:{id_}".encode() for id_ in segment.sources)
    captions = segment.captions if segment.settings.captions else None

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, segment.num_images, CHUNK):
            end = min(first + CHUNK, segment.num_images)
            yield digests(segment.codes_of(first, end), None if captions is None else captions[first:end])

    return np.concatenate([np.zeros(0, np.uint64), *chunks()])


class KnownContents:
    """Contents that are there already, with a name for each."""

    def __init__(self, contents: UInt64[np.ndarray, " n"], names: Sequence[str]):
        order = np.argsort(contents, kind="stable")
        self.contents, self.numbers, self.names = contents[order], order, names

    def find(self, contents: UInt64[np.ndarray, " n"]) -> list[str | None]:
        """Returns, of each content, the name of the first image that has it, None if there is none."""
        if not len(self.contents):
            return [None] * len(contents)
        places = np.minimum(np.searchsorted(self.contents, contents), len(self.contents) - 1)
        found = self.contents[places] == contents
        return [self.names[self.numbers[i]] if hit else None for i, hit in zip(places, found, strict=True)]


def contents_of_files(store: Datastore) -> KnownContents:
    """Returns the contents of all images of a store, those of its segments too, that came from files."""
    wholes = [x for x in store.wholes if not x.settings.split]
    contents = [np.zeros(0, np.uint64), *map(digests_of, wholes)]
    return KnownContents(np.concatenate(contents), [id_ for segment in wholes for id_ in segment.sources])
