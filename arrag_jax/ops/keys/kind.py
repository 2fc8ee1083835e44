"""Defines ``KeyKind``, the interface of a kind of key. The store, the searches and their report use only this.

A kind has a *table*: the array from which its keys and queries are computed. For keys of the context it is the
tokenizer's codebook, for keys of the backbone's state a projection.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, Integer

from arrag_jax.errors import UserError

Arrays = Any  # an array of NumPy or JAX; results belong to the same library as the input


@dataclasses.dataclass(frozen=True)
class KeyKind(abc.ABC):
    """A kind of key: what a store holds for it, how keys and queries are computed, and how their distance is computed.

    The values in keys and queries lie between -1 and 1. Objects are hashable, because they are static parts of compiled
    programs.

    Attributes:
      name: name in settings, indexes and messages.
      file: name of the store's files that keys are computed from: ``FILE-00000-of-00004.arrayrecord``.
      dtype: dtype of the records in these files.
      storages: the forms in which a dense search can hold keys; see ``retrieval.dense``.
      unique: whether equal contexts have equal keys; then a search holds each unique context once.
      query_from: source of the query: "context", the codes drawn around the position, which are known before the
        backbone's step; or "state", the step's hidden state. A request is then what ``search`` receives: four codes,
        or the state after its projection.
      in_bytes: whether the storage "int8" holds the stored bytes, which ``decoded`` turns into keys without loss.
    """

    name: str
    file: str
    dtype: str
    storages: tuple[str, ...]
    unique: bool
    query_from: str = "context"
    in_bytes: bool = False

    @abc.abstractmethod
    def positions(self, grid: tuple[int, int]) -> Int[np.ndarray, " M"]:
        """Returns the positions of a grid that have a key, in raster order; stored rows are numbered in this order."""

    @abc.abstractmethod
    def rows_in(self, record: tuple[int, ...], table: tuple[int, ...]) -> int:
        """Returns the number of stored rows per image, for a record and a table of these shapes."""

    @abc.abstractmethod
    def numbers(self, table: tuple[int, ...]) -> int:
        """Returns E, the dimension of a key, for a table of this shape."""

    @abc.abstractmethod
    def stored(
        self,
        records: np.ndarray,
        table: Float[np.ndarray, "n_table C"],
        rows: Integer[np.ndarray, "*dims"],
    ) -> Float[np.ndarray, "*dims E"]:
        """Returns the keys of stored rows, float32.

        Args:
          records: records of consecutive images.
          rows: row numbers, counted from the first of these images.
        """

    @abc.abstractmethod
    def query(self, table: Arrays, requested: Arrays) -> Arrays:
        """Returns the queries [..., E], float32; those of requests that are not ``complete`` have any value."""

    @abc.abstractmethod
    def complete(self, requested: Arrays) -> Arrays:
        """Returns which requests can have neighbours, bool [...]."""

    @abc.abstractmethod
    def scores(self, query: Arrays, keys: Arrays) -> Arrays:
        """Returns the scores of queries [B, E] and keys [n, E], float32 [B, n]; a nearer key has a larger score.

        Queries and keys have the same dtype. If they hold ``round(127 x)``, scores are larger by a factor of 127^2.
        """

    @abc.abstractmethod
    def distance(self, score: Arrays) -> Arrays:
        """Returns the squared L2 distances that belong to scores."""

    @abc.abstractmethod
    def score_error(self, query: Arrays, distance: Arrays) -> Arrays:
        """Returns a bound on the difference between ``distance`` of float32 ``scores`` and ``ops.distances``.

        Args:
          query: float32 [B, E].
          distance: float32 [B]; the bound holds for keys up to this distance.
        """

    @abc.abstractmethod
    def rounding_error(
        self,
        query: Float[Array, "B E"],
        rounded: Callable[[Array], Array],
        codebook: Float[Array, "V C"] | None,
    ) -> Float[Array, " B"]:
        """Returns a bound, per query, on the error of ``distance`` if queries and keys are rounded.

        Args:
          rounded: the rounding, from float32 to float32.
          codebook: the unrounded codebook, if the keys consist of its rows; None if the keys themselves are rounded.
        """

    def decoded(self, held: Arrays, table: Arrays) -> Arrays:
        """Returns keys, float32, from the numbers that a dense search holds where these are the stored bytes."""
        raise NotImplementedError

    def require_storage(self, storage: str) -> None:
        """Raises UserError unless a dense search can hold these keys in this form."""
        if storage not in self.storages:
            known = " or ".join(self.storages)
            raise UserError(f"storage={storage!r} is not available for keys={self.name!r}; choose {known}")
