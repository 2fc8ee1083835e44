"""What retrieval does to drawing: nothing (``Plain``), a mixed distribution (``Daid``), blended features (``Faid``)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from arrag_jax.config import DaidConfig
from arrag_jax.interfaces import Backbone, BlendingBackbone
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.ops.sampling import mix, neighbor_log_probs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """The model alone."""

    uses_retrieval = False
    blends = False

    def features(self, model: Backbone, neighbors: Neighbors, has_context: Bool[Array, ""]) -> None:
        """Nothing for the backbone."""

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, ""]
    ) -> Float[Array, "B V"]:
        """The model's distribution."""
        return log_p


@dataclasses.dataclass(frozen=True)
class Daid:
    """Distribution-level mixing, training-free: p = (1 − λ) p_model + λ p_retrieved.

    Source: docs/reference.md "DAiD". λ and τ are leaves of the pytree: a sweep over them compiles once.

    Attributes:
      weight: λ in [0, 1].
      temperature: τ > 0, in units of squared L2 distance of keys.
      reduction: "max" (the paper) or "sum"; see ``ops.sampling.neighbor_log_probs``.

    Raises:
      UserError: λ outside [0, 1], τ ≤ 0 or not finite (of tracers nothing is known), or an unknown rule.
    """

    weight: Any  # a number or an array of them, one a row of a ``vmap``; untyped, because tracers are numbers, too
    temperature: Any
    reduction: str = "max"
    uses_retrieval = True
    blends = False

    def __post_init__(self):
        DaidConfig(reduction=self.reduction)  # which refuses what cannot be
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer):
                continue
            for number in np.ravel(value).tolist():
                DaidConfig(**{name: number})

    def features(self, model: Backbone, neighbors: Neighbors, has_context: Bool[Array, ""]) -> None:
        """Nothing for the backbone."""

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, ""]
    ) -> Float[Array, "B V"]:
        """The mixture, in cells that have a context and rows that have a neighbour."""
        log_q = neighbor_log_probs(neighbors, log_p.shape[1], self.temperature, self.reduction)
        found = jnp.any(neighbors.code >= 0, axis=1)
        return mix(log_p, log_q, self.weight, found & has_context)


def _unflattened(reduction: str, numbers: Iterable[Any]) -> Daid:
    """A ``Daid`` of leaves that may be anything: gradients, shapes, tracers. So they are not checked."""
    policy = object.__new__(Daid)
    for name, value in zip(("weight", "temperature", "reduction"), (*numbers, reduction), strict=True):
        object.__setattr__(policy, name, value)
    return policy


jax.tree_util.register_pytree_with_keys(
    Daid,
    lambda x: (
        ((jax.tree_util.GetAttrKey("weight"), x.weight), (jax.tree_util.GetAttrKey("temperature"), x.temperature)),
        x.reduction,
    ),
    _unflattened,
    lambda x: ((x.weight, x.temperature), x.reduction),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Faid:
    """Feature-level blending: the backbone's blenders take the nearest neighbours' features.

    Source: docs/reference.md "FAiD". The backbone must have been trained with them.

    Attributes:
      mixture: what becomes of the distribution afterwards: ``Plain()``, or a ``Daid`` for both at once.
      neighbors: how many of the search's are blended; None = as many as the model was trained with.
    """

    mixture: Plain | Daid = Plain()
    neighbors: int | None = dataclasses.field(default=None, metadata={"static": True})
    uses_retrieval = True
    blends = True

    def features(
        self, model: BlendingBackbone, neighbors: Neighbors, has_context: Bool[Array, ""]
    ) -> Float[Array, "B K D"]:
        """Features of the nearest neighbours; zeros where a slot is empty."""
        codes = jnp.asarray(neighbors.code)
        return model.retrieved_features(codes[:, : self.neighbors or model.blended_neighbors])

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, ""]
    ) -> Float[Array, "B V"]:
        """The mixture's."""
        return self.mixture.log_probs(log_p, neighbors, has_context)
