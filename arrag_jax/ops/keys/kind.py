"""``KeyKind``: what a key is. The store, the searches and their report take all that they know of keys from it."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer

from arrag_jax.errors import UserError

Arrays = Any  # NumPy's or JAX's array; the answer is of the same library


@dataclasses.dataclass(frozen=True)
class KeyKind(abc.ABC):
    """What is stored for a kind of key, how keys and queries are made of it, and how near they are to each other.

    Numbers of keys and queries lie between -1 and 1. Objects are hashable: they are static parts of compiled programs.

    Attributes:
      name: as settings, indexes and messages call it.
      file: the part of a store that keys are made of; its files are called ``FILE-00000-of-00004.arrayrecord``.
      dtype: of that part's records.
      storages: what a dense search may hold of a key; see ``retrieval.dense``.
      unique: do equal contexts have equal keys? Then a search holds each context once.
      query_from: "context", known before the backbone's step, or "state", the step's own hidden state.
    """

    name: str
    file: str
    dtype: str
    storages: tuple[str, ...]
    unique: bool
    query_from: str = "context"

    @abc.abstractmethod
    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """The shape of one image's record."""

    @abc.abstractmethod
    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """Records of images by what the tokenizer gave, [n, *record shape]."""

    @abc.abstractmethod
    def numbers(self, code_dim: int) -> int:
        """E, how many numbers a key has, for codes of so many numbers."""

    @abc.abstractmethod
    def stored(
        self,
        records: np.ndarray,
        codebook: Float[np.ndarray, "V C"],
        rows: Integer[np.ndarray, "*dims"],
    ) -> Float[np.ndarray, "*dims E"]:
        """Keys of stored rows, float32.

        Args:
          records: of images, one after another; rows count from the first one's.
        """

    @abc.abstractmethod
    def query(self, codebook: Arrays, requested: Arrays) -> Arrays:
        """Float32 queries [..., E] of what is requested; any where it is not ``complete``."""

    @abc.abstractmethod
    def complete(self, requested: Arrays) -> Arrays:
        """Which of what is requested can have neighbours, bool [...]."""

    @abc.abstractmethod
    def scores(self, query: Arrays, keys: Arrays) -> Arrays:
        """Float32 [B, n] of queries [B, E] and keys [n, E], both in one type: the nearer, the larger.

        Where numbers are held as ``round(127 x)``, scores are 127^2 times as large.
        """

    @abc.abstractmethod
    def distance(self, score: Arrays) -> Arrays:
        """The squared L2 distances that scores stand for."""

    @abc.abstractmethod
    def score_error(self, numbers: int) -> float:
        """Most by which ``distance`` of float32 ``scores`` differs from ``ops.distances``; for keys of E numbers."""

    @abc.abstractmethod
    def rounding_error(
        self,
        query: Float[Array, "B E"],
        rounded: Callable[[Array], Array],
        codebook: Float[Array, "V C"] | None,
    ) -> Float[Array, " B"]:
        """Most by which ``distance`` differs where scores are those of rounded queries and keys.

        Args:
          rounded: what is held of float32 numbers, as float32.
          codebook: whose rows the keys consist of, as they are before rounding; None: the keys themselves are rounded.
        """

    def require_storage(self, storage: str) -> None:
        """Raises UserError unless a dense search may hold these keys so."""
        if storage not in self.storages:
            known = " or ".join(self.storages)
            raise UserError(f"storage={storage!r} is not to be had of keys={self.name!r}; choose {known}")
