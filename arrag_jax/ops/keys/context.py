"""Keys of the vectors of the context's cells, side by side: parts of unit norm each, whose query is the context.

‖q − k‖² is the number of parts twice, less 2 q·k, so that searches need no table of norms.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from arrag_jax.ops import distances
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys.kind import Arrays, KeyKind

PARTS = len(grid_ops.CONTEXT_OFFSETS)


class ContextKeys(KeyKind):
    """What both kinds share."""

    def numbers(self, code_dim: int) -> int:
        """Those of all parts."""
        return PARTS * code_dim

    def query(self, codebook: Arrays, requested: Arrays) -> Arrays:
        """The codes' vectors side by side."""
        library = np if isinstance(codebook, np.ndarray) else jnp
        vectors = library.take(codebook, library.maximum(requested, 0), axis=0)
        return vectors.reshape(*requested.shape[:-1], -1)

    def complete(self, requested: Arrays) -> Arrays:
        """Those whose cells all have a code."""
        return (requested >= 0).all(-1)

    def scores(self, query: Arrays, keys: Arrays) -> Arrays:
        """Products."""
        if isinstance(keys, np.ndarray):
            return query @ keys.T
        # full precision: at a GPU's or TPU's default, float32 scores would be wrong in the third digit
        sums = jnp.int32 if keys.dtype == jnp.int8 else jnp.float32
        kinds = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": sums}
        return jnp.einsum("be,ne->bn", query, keys, **kinds).astype(jnp.float32)

    def distance(self, score: Arrays) -> Arrays:
        """As both have one part of unit norm after another."""
        return 2 * PARTS - 2 * score

    def score_error(self, numbers: int) -> float:
        """See ``ops.distances``."""
        return distances.score_error(numbers, PARTS)

    def rounding_error(
        self,
        query: Float[Array, "B E"],
        rounded: Callable[[Array], Array],
        codebook: Float[Array, "V C"] | None,
    ) -> Float[Array, " B"]:
        """Part by part: what the codebook's rows lose, or at most what bfloat16 loses of any key."""
        query = query.reshape(len(query), PARTS, -1)
        error = self.score_error(PARTS * query.shape[2])
        if codebook is None:  # bfloat16 keeps eight bits: numbers and norms are off by 2^-9 of themselves at most
            lost = jnp.sqrt(((query - rounded(query)) ** 2).sum(2)).sum(1)
            return 2.01 * lost + 1.0025 * PARTS * 2.0**-8 + error
        product = functools.partial(jnp.einsum, "bpc,vc->bpv", precision=jax.lax.Precision.HIGHEST)
        lost = product(query, codebook) - product(rounded(query), rounded(codebook))
        return 2 * jnp.abs(lost).max(2).sum(1) + 2 * error


class CodebookKeys(ContextKeys):
    """Keys that follow from the context's codes: rows of the codebook."""

    def __init__(self):
        super().__init__("codebook", "codes", "<u2", ("codes", "float32", "bfloat16", "int8"), unique=True)

    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """A code a cell."""
        return grid

    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """The codes."""
        return codes.astype(self.dtype)

    def stored(
        self, records: np.ndarray, codebook: Float[np.ndarray, "V C"], rows: Integer[np.ndarray, "*dims"]
    ) -> Float[np.ndarray, "*dims E"]:
        """The queries of the rows' contexts."""
        return self.query(codebook, records.reshape(-1)[_cells(records.shape[1:3], rows)])


class LatentKeys(ContextKeys):
    """Keys of the encoder's outputs before quantisation, which hardly repeat."""

    def __init__(self):
        # of int8 too few of the nearest are found
        super().__init__("latent", "latents", "<f2", ("float32", "bfloat16"), unique=False)

    def record_shape(self, grid: tuple[int, int], code_dim: int) -> tuple[int, ...]:
        """A vector a cell."""
        return *grid, code_dim

    def records(self, codes: Integer[np.ndarray, "n H W"], latents: Float[np.ndarray, "n H W C"]) -> np.ndarray:
        """The vectors, of unit norm."""
        return unit_norm(latents).astype(self.dtype)

    def stored(
        self, records: np.ndarray, codebook: Float[np.ndarray, "V C"], rows: Integer[np.ndarray, "*dims"]
    ) -> Float[np.ndarray, "*dims E"]:
        """The vectors of the rows' cells, of unit norm in float32 too."""
        vectors = records.reshape(-1, records.shape[-1])[_cells(records.shape[1:3], rows)]
        return unit_norm(vectors).reshape(*rows.shape, -1)


def _cells(grid: tuple[int, int], rows: Integer[np.ndarray, "*dims"]) -> Integer[np.ndarray, "*dims P"]:
    """The context's cells of stored rows, numbered image after image."""
    image, position = grid_ops.image_and_position(rows, *grid)
    return image[..., None] * (grid[0] * grid[1]) + grid_ops.context_positions(*grid)[position]


def unit_norm(vectors: Float[np.ndarray, "*dims C"]) -> Float[np.ndarray, "*dims C"]:
    """Rows scaled to length 1, float32; a zero row stays zero."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
