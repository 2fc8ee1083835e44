"""The decode policies: no retrieval (``Plain``), a mixed distribution (``Daid``) or blended features (``Faid``)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from arrag_jax.config import DaidConfig
from arrag_jax.decode.gates import Seen
from arrag_jax.interfaces import Backbone, BlendingBackbone
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.ops.sampling import mix, neighbor_log_probs, shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """The policy without retrieval: samples from the model alone."""

    uses_retrieval = False
    blends = False

    def features(self, model: Backbone, neighbors: Neighbors, has_context: Bool[Array, "*B"]) -> None:
        """Returns None: the backbone gets no features."""

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, "B V"]:
        """Returns the model's distribution unchanged."""
        return log_p


@dataclasses.dataclass(frozen=True)
class Daid:
    """The policy that mixes distributions, without training: p = (1 − λ) p_model + λ p_retrieved.

    Source: docs/reference.md "DAiD". λ and τ are leaves of the pytree, so a sweep over them compiles once. With a gate,
    λ is multiplied by the gate's factor, which differs between positions.

    Attributes:
      weight: λ in [0, 1].
      temperature: τ > 0, in units of squared L2 distance of keys.
      reduction: "max" (the paper) or "sum"; see ``ops.sampling.neighbor_log_probs``.
      gate: a ``decode.gates.Gate``; None = λ is constant, as in the paper.

    Raises:
      UserError: if λ is outside [0, 1], if τ ≤ 0 or is not finite, or if the reduction is unknown. Tracers are not
        checked, because they have no value yet.
    """

    weight: Any  # a number, or an array with one number per row of a ``vmap``; Any, because it may be a tracer
    temperature: Any
    reduction: str = "max"
    gate: Any = None
    uses_retrieval = True
    blends = False

    def __post_init__(self):
        DaidConfig(reduction=self.reduction)  # raises if it is invalid
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer):
                continue
            for number in np.ravel(value).tolist():
                DaidConfig(**{name: number})

    @classmethod
    def of(cls, config: DaidConfig) -> "Daid":
        """Returns the policy with the config's numbers, without its gate, which depends on prompts and a store."""
        return cls(config.weight, config.temperature, config.reduction)

    def features(self, model: Backbone, neighbors: Neighbors, has_context: Bool[Array, "*B"]) -> None:
        """Returns None: the backbone gets no features."""

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, "B V"]:
        """Returns the mixture.

        Rows without a neighbour, and all rows where the position has no context, keep the model's distribution.
        """
        log_q, weight = self._retrieved(log_p, neighbors)
        return mix(log_p, log_q, weight, _found(neighbors) & has_context)

    def weights(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, " B"]:
        """Returns the λ of each row; 0 where nothing is mixed."""
        weight = jnp.asarray(self._retrieved(log_p, neighbors)[1], jnp.float32)
        return jnp.where(_found(neighbors) & has_context, weight, 0.0)

    def _retrieved(self, log_p: Float[Array, "B V"], neighbors: Neighbors) -> tuple[Float[Array, "B V"], Any]:
        """Returns the neighbours' log-probabilities, and λ after the gate: one number, or one per row."""
        log_q = neighbor_log_probs(neighbors, log_p.shape[1], self.temperature, self.reduction)
        if self.gate is None:
            return log_q, self.weight
        seen = Seen(log_p, neighbors, shares(neighbors, self.temperature), log_q)
        return log_q, self.weight * self.gate.factor(seen)


def _found(neighbors: Neighbors) -> Bool[Array, " B"]:
    """Returns which rows have a neighbour."""
    return jnp.any(neighbors.code >= 0, axis=1)


_LEAVES = ("weight", "temperature", "gate")


def _unflattened(reduction: str, leaves: Iterable[Any]) -> Daid:
    """Returns a ``Daid`` without checking its leaves, because JAX also puts gradients, shapes and tracers there."""
    policy = object.__new__(Daid)
    for name, value in zip((*_LEAVES, "reduction"), (*leaves, reduction), strict=True):
        object.__setattr__(policy, name, value)
    return policy


jax.tree_util.register_pytree_with_keys(
    Daid,
    lambda x: (tuple((jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in _LEAVES), x.reduction),
    _unflattened,
    lambda x: (tuple(getattr(x, name) for name in _LEAVES), x.reduction),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Faid:
    """The policy that blends features: the backbone's blenders receive the features of the nearest neighbours.

    Source: docs/reference.md "FAiD". The backbone must have been trained with its blenders.

    Attributes:
      mixture: the policy for the distribution that follows: ``Plain()``, or a ``Daid`` to combine both.
      neighbors: how many of the retrieved neighbours are blended; None = as many as in the model's training.
    """

    mixture: Plain | Daid = Plain()
    neighbors: int | None = dataclasses.field(default=None, metadata={"static": True})
    uses_retrieval = True
    blends = True

    def features(
        self, model: BlendingBackbone, neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, "B K D"]:
        """Returns the features of the nearest neighbours; zeros where a slot is empty."""
        codes = jnp.asarray(neighbors.code)
        return model.retrieved_features(codes[:, : self.neighbors or model.blended_neighbors])

    def log_probs(
        self, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
    ) -> Float[Array, "B V"]:
        """Returns the distribution that ``mixture`` makes of the model's."""
        return self.mixture.log_probs(log_p, neighbors, has_context)


def mixture_of(policy: Any) -> Daid | None:
    """Returns the part of a policy that mixes distributions; None if it mixes nothing."""
    mixture = policy.mixture if isinstance(policy, Faid) else policy
    return mixture if isinstance(mixture, Daid) else None


def with_gate(policy: Any, gate: Any) -> Any:
    """Returns a policy whose mixture has this gate."""
    if isinstance(policy, Faid):
        return dataclasses.replace(policy, mixture=with_gate(policy.mixture, gate))
    return dataclasses.replace(policy, gate=gate)


def weights_of(
    policy: Any, log_p: Float[Array, "B V"], neighbors: Neighbors, has_context: Bool[Array, "*B"]
) -> Float[Array, " B"]:
    """Returns the share λ of the neighbours' distribution in each row; 0 for a policy that mixes nothing."""
    mixture = mixture_of(policy)
    if mixture is not None:
        return mixture.weights(log_p, neighbors, has_context)
    return jnp.zeros(len(log_p), jnp.float32)
