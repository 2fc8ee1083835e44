"""Keeps a search from copying a stored image: neighbours that would continue a copy are left out.

The *share* of a stored image in a picture is the part of the image's bits that the picture already repeats at one
displacement. The bits of a code are its surprise under the backbone, so a plain background hardly counts, and what the
backbone does not know counts most.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arrag_jax.ops.keys.hidden import SURPRISE_STEP
from arrag_jax.ops.neighbors import Neighbors, merge_neighbors

COPIED = 0.95  # share of equal codes from which a picture counts as a copy of a stored image
LEAST = 1 / 64  # bits that every code counts at least, so that an image without surprise has a share, too
TOGETHER = 256  # rows that are compared at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class UncopiedRetriever:
    """A ``StateRetriever`` without the neighbours whose image has a share of ``most`` or more in the picture.

    Only displacements at which a picture can become a copy (``COPIED``) are looked at.

    Attributes:
      local: the search.
      codes: integer [M, T], the codes of the stored images.
      surprise: uint8 [M, T], their surprise in steps of ``SURPRISE_STEP`` bits.
      most: the share, in (0, 1].
      grid: height and width in codes.
    """

    local: Any
    codes: Any
    surprise: Any
    most: Any
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def k(self) -> int:
        return self.local.k

    def with_k(self, k: int) -> "UncopiedRetriever":
        """Returns the same search for another number of neighbours."""
        return dataclasses.replace(self, local=self.local.with_k(k))

    def search_states(
        self, state: Float[Array, "B D"], drawn: Int[Array, "B T"], position: Int[Array, " B"]
    ) -> Neighbors:
        """Returns the neighbours that are left, nearest first; the last slots are empty."""
        found = self.local.search_states(state, drawn, position)
        keep = jax.lax.map(self._is_no_copy, (drawn, position, found.id), batch_size=TOGETHER)
        rest = Neighbors(
            jnp.where(keep, found.code, -1), jnp.where(keep, found.distance, jnp.inf), jnp.where(keep, found.id, -1)
        )
        return merge_neighbors(jax.tree.map(lambda x: x[None], rest), self.k)

    def _is_no_copy(self, row: tuple[Int[Array, " T"], Int[Array, ""], Int[Array, " K"]]) -> Bool[Array, " K"]:
        """Returns which neighbours of one row may stay."""
        drawn, position, ids = row
        (height, width), cells = self.grid, np.arange(np.prod(self.grid))[None]
        image, place = jnp.divmod(jnp.maximum(ids, 0), cells.size)
        down, right = position // width - place // width, position % width - place % width
        can_copy = (height - abs(down)) * (width - abs(right)) >= COPIED * cells.size
        rows, columns = cells // width - down[:, None], cells % width - right[:, None]  # where each cell came from
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width) & (cells < position)
        source = jnp.clip(rows, 0, height - 1) * width + jnp.clip(columns, 0, width - 1)
        equal = inside & (jnp.take_along_axis(self.codes[image].astype(jnp.int32), source, 1) == drawn[None])
        bits = jnp.maximum(self.surprise[image] * SURPRISE_STEP, LEAST)
        share = jnp.where(equal, jnp.take_along_axis(bits, source, 1), 0).sum(1) / bits.sum(1)
        return ~(can_copy & (share >= self.most))
