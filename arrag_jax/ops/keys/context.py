"""Defines keys that concatenate one vector per context position; the query is made from the context's codes.

Each of the four parts of a key has unit norm. So ‖q − k‖² = 2 · parts − 2 q·k, and a search needs no table of norms.
"""

import abc
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from arrag_jax.ops import distances
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys.kind import Arrays, KeyKind

PARTS = len(grid_ops.CONTEXT_OFFSETS)


class ContextKeys(KeyKind):
    """Base class of the keys that concatenate one vector per context position."""

    @abc.abstractmethod
    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """Returns the shape of one image's record."""

    @abc.abstractmethod
    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """Returns the records of n images, [n, *record shape], from the tokenizer's outputs."""

    def positions(self, grid: tuple[int, int]) -> Int[np.ndarray, " M"]:
        """Returns the positions that have a complete context."""
        return grid_ops.positions_with_context(*grid)

    def rows_in(self, record: tuple[int, ...], table: tuple[int, ...]) -> int:
        """Returns the number of positions that have a complete context."""
        return len(self.positions((record[0], record[1])))

    def numbers(self, table: tuple[int, ...]) -> int:
        """Returns E, the dimension of all parts together."""
        return PARTS * table[1]

    def query(self, table: Arrays, requested: Arrays) -> Arrays:
        """Returns the concatenated codebook vectors of the requested contexts."""
        library = np if isinstance(table, np.ndarray) else jnp
        vectors = library.take(table, library.maximum(requested, 0), axis=0)
        return vectors.reshape(*requested.shape[:-1], -1)

    def complete(self, requested: Arrays) -> Arrays:
        """Returns which contexts have a code at all four positions."""
        return (requested >= 0).all(-1)

    def scores(self, query: Arrays, keys: Arrays) -> Arrays:
        """Returns the inner products of queries and keys."""
        if isinstance(keys, np.ndarray):
            return query @ keys.T
        # With the default precision of a GPU or TPU, float32 scores would be wrong in the third digit.
        sums = jnp.int32 if keys.dtype == jnp.int8 else jnp.float32
        kinds = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": sums}
        return jnp.einsum("be,ne->bn", query, keys, **kinds).astype(jnp.float32)

    def distance(self, score: Arrays) -> Arrays:
        """Returns 2 · parts − 2 · score, because every part has unit norm."""
        return 2 * PARTS - 2 * score

    def score_error(self, query: Arrays, distance: Arrays) -> Arrays:
        """Returns the bound of ``ops.distances.score_error``, which is equal for all distances."""
        return distance * 0 + distances.score_error(query.shape[1], PARTS)

    def rounding_error(
        self,
        query: Float[Array, "B E"],
        rounded: Callable[[Array], Array],
        codebook: Float[Array, "V C"] | None,
    ) -> Float[Array, " B"]:
        """Returns a bound summed over parts: the loss of the codebook's rows, or bfloat16's loss for any key."""
        error = distances.score_error(query.shape[1], PARTS)
        query = query.reshape(len(query), PARTS, -1)
        if codebook is None:  # bfloat16 keeps eight bits: values and norms have a relative error of at most 2^-9
            lost = jnp.sqrt(((query - rounded(query)) ** 2).sum(2)).sum(1)
            return 2.01 * lost + 1.0025 * PARTS * 2.0**-8 + error
        product = functools.partial(jnp.einsum, "bpc,vc->bpv", precision=jax.lax.Precision.HIGHEST)
        lost = product(query, codebook) - product(rounded(query), rounded(codebook))
        return 2 * jnp.abs(lost).max(2).sum(1) + 2 * error


class CodebookKeys(ContextKeys):
    """Keys that consist of the codebook vectors of the context's codes."""

    def __init__(self):
        super().__init__("codebook", "codes", "<u2", ("codes", "float32", "bfloat16", "int8"), unique=True)

    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """Returns [H, W]: one code per position."""
        return grid

    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """Returns the codes."""
        return codes.astype(self.dtype)

    def stored(
        self, records: np.ndarray, table: Float[np.ndarray, "V C"], rows: Integer[np.ndarray, "*dims"]
    ) -> Float[np.ndarray, "*dims E"]:
        """Returns the keys of the rows, which equal the queries of their contexts."""
        return self.query(table, records.reshape(-1)[_cells(records.shape[1:3], rows)])


class LatentKeys(ContextKeys):
    """Keys that consist of the encoder's outputs before quantisation; two patches rarely have equal keys."""

    def __init__(self):
        # int8 is not offered, because it misses too many of the nearest neighbours.
        super().__init__("latent", "latents", "<f2", ("float32", "bfloat16"), unique=False)

    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """Returns [H, W, C]: one vector per position."""
        return *grid, code_dim

    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """Returns the latents, scaled to unit norm."""
        return unit_norm(latents).astype(self.dtype)

    def stored(
        self, records: np.ndarray, table: Float[np.ndarray, "V C"], rows: Integer[np.ndarray, "*dims"]
    ) -> Float[np.ndarray, "*dims E"]:
        """Returns the keys of the rows; parts are scaled again, because float16 records have only nearly unit norm."""
        vectors = records.reshape(-1, records.shape[-1])[_cells(records.shape[1:3], rows)]
        return unit_norm(vectors).reshape(*rows.shape, -1)


def _cells(grid: tuple[int, int], rows: Integer[np.ndarray, "*dims"]) -> Integer[np.ndarray, "*dims P"]:
    """Returns the context positions of stored rows, as indices into the positions of all images in sequence."""
    image, position = grid_ops.image_and_position(rows, *grid)
    return image[..., None] * (grid[0] * grid[1]) + grid_ops.context_positions(*grid)[position]


def unit_norm(vectors: Float[np.ndarray, "*dims C"]) -> Float[np.ndarray, "*dims C"]:
    """Returns vectors scaled to unit norm, float32; a zero vector stays zero."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
