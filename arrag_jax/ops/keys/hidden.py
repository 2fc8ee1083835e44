"""Defines keys made of the backbone's hidden states, from which it predicts codes; the query is the state of a step.

A state is projected to a few numbers by a principal component analysis of the store's states. A key is held as one byte
per number. The table is the projection, float32 [D + 2, E]: D rows of weights, one row of offsets, and one row of
ranges. The number j of a key is ``byte / 127 * range[j]``; the largest range is 1.

Source: Khandelwal et al. 2020, kNN-LM (arXiv 1911.00172), with images in place of text.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

from arrag_jax.ops.grid import positions_with_context
from arrag_jax.ops.keys.kind import Arrays, KeyKind

STEPS = 127  # a byte holds a number x of range r as round(127 x / r)
SURPRISE_STEP = 1 / 16  # bits per unit of a stored surprise; the largest is 255 / 16 bits
EXCESS_STEP = 1 / 8  # bits per unit of a stored excess, a signed byte
CLIPPED = 1e-4  # share of the fitted numbers that lie outside their range
MEANS = 2  # float32 numbers at the end of a record


class Told(NamedTuple):
    """What a record tells about the codes of n images, without their keys.

    Attributes:
      surprise: -log2 of each code's probability under the backbone, in steps of ``SURPRISE_STEP`` bits.
      excess: surprise minus the entropy of the backbone's distribution, in steps of ``EXCESS_STEP`` bits.
      mean_surprise, mean_excess: means over the positions in bits, computed before rounding.
    """

    surprise: UInt8[np.ndarray, "n T"]
    excess: Int8[np.ndarray, "n T"]
    mean_surprise: Float[np.ndarray, " n"]
    mean_excess: Float[np.ndarray, " n"]


class HiddenKeys(KeyKind):
    """Keys of every position of a grid; two patches never share one."""

    def __init__(self):
        storages = "float32", "int8"
        super().__init__("hidden", "hidden", "<u1", storages, unique=False, query_from="state", in_bytes=True)

    def record_bytes(self, cells: int, numbers: int) -> int:
        """Returns the bytes of one image's record: keys, surprises, excesses, and two means."""
        return cells * (numbers + 2) + 4 * MEANS

    def records(
        self,
        states: Float[np.ndarray, "n T D"],
        surprise: Float[np.ndarray, "n T"],
        excess: Float[np.ndarray, "n T"],
        table: Float[np.ndarray, "D2 E"],
    ) -> UInt8[np.ndarray, "n R"]:
        """Returns the records of n images.

        Args:
          states: the backbone's hidden states.
          surprise, excess: of each code, in bits.
          table: the projection.
        """
        keys = np.rint(np.clip(project(table, states) / table[-1], -1, 1) * STEPS).astype(np.int8)
        surprises = np.clip(np.rint(surprise / SURPRISE_STEP), 0, 255).astype(np.uint8)
        excesses = np.clip(np.rint(excess / EXCESS_STEP), -128, 127).astype(np.int8)
        means = np.stack([surprise.mean(1, np.float64), excess.mean(1, np.float64)], 1).astype("<f4")
        parts = keys.reshape(len(keys), -1), surprises, excesses, means
        return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], 1)

    def told(self, records: UInt8[np.ndarray, "n R"], numbers: int) -> Told:
        """Returns what records tell about their codes; ``numbers`` is E."""
        cells = self._cells(records.shape[1:], numbers)
        surprise, excess = (records[:, first : first + cells] for first in (cells * numbers, cells * (numbers + 1)))
        means = np.ascontiguousarray(records[:, -4 * MEANS :]).view("<f4")
        signed = np.ascontiguousarray(excess).view(np.int8)
        return Told(np.ascontiguousarray(surprise), signed, means[:, 0], means[:, 1])

    def patches(self, rows: Int[np.ndarray, "*n"], grid: tuple[int, int]) -> Int[np.ndarray, "*n"]:
        """Returns the rows that keys of the context have for the same patches (``ops.grid``).

        The result is -1 for the empty row -1 and for patches without a complete context.
        """
        numbers = np.full(grid[0] * grid[1], -1)
        held = positions_with_context(*grid)
        numbers[held] = np.arange(len(held))
        image, position = np.divmod(np.asarray(rows), grid[0] * grid[1])
        number = numbers[position]
        return np.where((np.asarray(rows) < 0) | (number < 0), -1, image * len(held) + number).astype(np.int32)

    def positions(self, grid: tuple[int, int]) -> Int[np.ndarray, " M"]:
        """Returns all positions."""
        return np.arange(grid[0] * grid[1], dtype=np.int32)

    def rows_in(self, record: tuple[int, ...], table: tuple[int, ...]) -> int:
        """Returns the number of positions."""
        return self._cells(record, table[1])

    def numbers(self, table: tuple[int, ...]) -> int:
        """Returns E, the number of components of the projection."""
        return table[1]

    def held(self, records: UInt8[np.ndarray, "n R"], numbers: int) -> Int8[np.ndarray, "n T E"]:
        """Returns the bytes of the keys in records."""
        cells = self._cells(records.shape[1:], numbers)
        return records[:, : cells * numbers].view(np.int8).reshape(len(records), cells, numbers)

    def stored(
        self, records: np.ndarray, table: Float[np.ndarray, "D2 E"], rows: Integer[np.ndarray, "*dims"]
    ) -> Float[np.ndarray, "*dims E"]:
        """Returns the keys of the rows."""
        held = self.held(records, table.shape[1])
        image, position = np.divmod(rows, held.shape[1])
        return self.decoded(held[image, position], table)

    def decoded(self, held: Arrays, table: Arrays) -> Arrays:
        """Returns the keys of their bytes, float32."""
        return held.astype(np.float32) * _beside(table[-1] * np.float32(1 / STEPS), held)

    def query(self, table: Arrays, requested: Arrays) -> Arrays:
        """Returns the request, which is a projected state."""
        return requested

    def complete(self, requested: Arrays) -> Arrays:
        """Returns which requests are numbers; an incomplete request holds NaN."""
        return (requested == requested).all(-1)

    def scores(self, query: Arrays, keys: Arrays) -> Arrays:
        """Returns the negative squared distances of queries and keys, as |q|² + |k|² - 2 q·k."""
        if isinstance(keys, np.ndarray):
            return 2 * query @ keys.T - (query**2).sum(1)[:, None] - (keys**2).sum(1)[None]
        product = jnp.einsum("be,ne->bn", query, keys, precision=jax.lax.Precision.HIGHEST)
        return 2 * product - (query**2).sum(1)[:, None] - (keys**2).sum(1)[None]

    def distance(self, score: Arrays) -> Arrays:
        """Returns the negated score."""
        return -score

    def score_error(self, query: Arrays, distance: Arrays) -> Arrays:
        """Returns a bound of the rounding of three float32 sums, which grows with the norms of query and key."""
        numbers, unit = query.shape[1], 2.0**-24
        norm = (query**2).sum(1) ** 0.5
        farthest = abs(distance) ** 0.5
        summed = (numbers + 4) * unit * (2 * norm + farthest) ** 2
        grid = 2 * (farthest + 2.0**-10) * numbers**0.5 * 2.0**-22
        return summed + grid

    def rounding_error(
        self, query: Float[Array, "B E"], rounded: Callable[[Array], Array], codebook: Float[Array, "V C"] | None
    ) -> Float[Array, " B"]:
        """Is never called, because the stored bytes are the keys."""
        raise NotImplementedError

    def _cells(self, record: tuple[int, ...], numbers: int) -> int:
        """Returns T, the number of positions of a record of this shape."""
        return (record[0] - 4 * MEANS) // (numbers + 2)


def _beside(row: Arrays, other: Arrays) -> Arrays:
    """Returns a row [E] with as many axes as ``other``, because JAX is asked not to add axes by itself."""
    return row.reshape((1,) * (other.ndim - 1) + row.shape)


def project(table: Arrays, states: Arrays) -> Arrays:
    """Returns the queries [..., E] of states [..., D], float32, clipped to [-1, 1]."""
    library = np if isinstance(table, np.ndarray) else jnp
    weights, offset = table[:-2], _beside(table[-2], states)
    if library is np:
        projected = np.asarray(states, np.float32) @ weights + offset
    else:
        projected = jnp.matmul(states.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST) + offset
    return library.clip(projected, -1, 1)


def fit_projection(states: Float[np.ndarray, "n D"], numbers: int) -> Float[np.ndarray, "D2 E"]:
    """Returns the table of a projection to the principal components of states.

    Args:
      states: a sample of the store's states.
      numbers: E, at most D.
    """
    states = np.asarray(states, np.float64)
    mean = states.mean(0)
    _, vectors = np.linalg.eigh((states - mean).T @ (states - mean))
    axes = vectors[:, ::-1][:, :numbers]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)  # a fixed sign
    ranges = np.maximum(np.quantile(np.abs((states - mean) @ axes), 1 - CLIPPED, axis=0), 1e-12)
    scale = 1 / ranges.max()
    return np.concatenate([axes * scale, -(mean @ axes)[None] * scale, ranges[None] * scale]).astype(np.float32)
