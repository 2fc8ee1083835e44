"""Search by the backbone's state: projects it, and hands the projection to any search over keys of kind "hidden"."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from arrag_jax.ops.keys.hidden import project
from arrag_jax.ops.neighbors import Neighbors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HiddenRetriever:
    """An ``interfaces.StateRetriever``.

    Attributes:
      local: a search that takes projected states: a ``DenseRetriever``, ``ScannRetriever``, ``ShardedRetriever`` or
        ``LimitedRetriever`` over hidden keys.
      table: float32 [D + 2, E], the projection (``ops.keys.hidden``).
    """

    local: Any
    table: Any

    @property
    def k(self) -> int:
        return self.local.k

    def with_k(self, k: int) -> "HiddenRetriever":
        """Returns the same search for another number of neighbours."""
        return dataclasses.replace(self, local=self.local.with_k(k))

    def search_states(
        self, state: Float[Array, "B D"], drawn: Int[Array, "B T"], position: Int[Array, " B"]
    ) -> Neighbors:
        """Returns the neighbours of B states, nearest first; they depend on the states alone."""
        return self.local.search(project(self.table, jax.lax.stop_gradient(state)))
