"""Defines ``KeyKind``, the interface of a kind of key. The store, the searches and their report use only this."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer

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
      query_from: source of the query: "context", known before the backbone's step, or "state", the step's hidden state.
    """

    name: str
    file: str
    dtype: str
    storages: tuple[str, ...]
    unique: bool
    query_from: str = "context"

    @abc.abstractmethod
    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """Returns the shape of one image's record."""

    @abc.abstractmethod
    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """Returns the records of n images, [n, *record shape], from the tokenizer's outputs."""

    @abc.abstractmethod
    def numbers(self, code_dim: int) -> int:
        """Returns E, the dimension of a key, for codes of dimension ``code_dim``."""

    @abc.abstractmethod
    def stored(
        self,
        records: np.ndarray,
        codebook: Float[np.ndarray, "V C"],
        rows: Integer[np.ndarray, "*dims"],
    ) -> Float[np.ndarray, "*dims E"]:
        """Returns the keys of stored rows, float32.

        Args:
          records: records of consecutive images.
          rows: row numbers, counted from the first of these images.
        """

    @abc.abstractmethod
    def query(self, codebook: Arrays, requested: Arrays) -> Arrays:
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
    def score_error(self, numbers: int) -> float:
        """Returns a bound on the difference between ``distance`` of float32 ``scores`` and ``ops.distances``.

        Args:
          numbers: E, the dimension of keys.
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

    def require_storage(self, storage: str) -> None:
        """Raises UserError unless a dense search can hold these keys in this form."""
        if storage not in self.storages:
            known = " or ".join(self.storages)
            raise UserError(f"storage={storage!r} is not available for keys={self.name!r}; choose {known}")
