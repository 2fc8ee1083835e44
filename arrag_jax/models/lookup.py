"""A model with FAiD's blenders beside the frozen base whose states find its neighbours.

Keys of kind "hidden" belong to one backbone. A tuned model has other states, so the base runs beside it: at every
position first the base, whose state is searched, then the tuned model, whose blenders take the neighbours.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from arrag_jax.interfaces import ArrayLike, Cache, Condition


class LookupModel(nnx.Module):
    """Implements ``interfaces.BlendingBackbone`` and ``StatefulBackbone`` with two models of one tokenizer.

    Without features, ``step_state`` runs the base, and with features the tuned model. ``step`` and ``teacher_forced``
    always run the tuned model. ``states`` are the base's, logits the tuned model's.

    Attributes:
      tuned: a model with blenders.
      base: the model whose states are searched.
    """

    def __init__(self, tuned: Any, base: Any):
        self.tuned, self.base = tuned, base

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        return self.tuned.grid

    @property
    def codebook_size(self) -> int:
        """V, the number of codes."""
        return self.tuned.codebook_size

    @property
    def blended_neighbors(self) -> int:
        """K of the tuned model's blenders."""
        return self.tuned.blended_neighbors

    @property
    def backbone_fingerprint(self) -> str:
        """Identity of the base, whose hidden keys are searched."""
        return self.base.backbone_fingerprint

    def with_grid(self, grid: ArrayLike) -> "LookupModel":
        """Returns the same two models for another grid."""
        return LookupModel(self.tuned.with_grid(grid), self.base.with_grid(grid))

    def fused(self) -> "LookupModel":
        """Returns a copy for decoding; see ``interfaces.BlendingBackbone.fused``."""
        return LookupModel(self.tuned.fused(), self.base)

    def check_condition(self, condition: ArrayLike, mask: ArrayLike = None) -> Condition:
        """Returns the condition as device arrays; both models take the same."""
        return self.tuned.check_condition(condition, mask)

    def unconditional(self, condition: Condition) -> Condition:
        """Returns the condition of the unconditional rows of classifier-free guidance."""
        return self.tuned.unconditional(condition)

    def retrieved_features(self, neighbors: Int[Array, "*dims K"]) -> Float[Array, "*dims K D"]:
        """Returns the features of retrieved codes, which the tuned model's blenders take."""
        return self.tuned.retrieved_features(neighbors)

    def prefill(self, condition: Condition, blended_rows: int) -> tuple[Float[Array, "R E"], Cache]:
        """Returns the input of position 0 and the cache, of the tuned model and then of the base."""
        hidden, cache = self.tuned.prefill(condition, blended_rows)
        hidden_of_base, cache_of_base = self.base.prefill(condition, 0)
        return jnp.concatenate([hidden, hidden_of_base], axis=-1), (cache, cache_of_base)

    def embed_codes(self, codes: Int[Array, "*dims"]) -> Float[Array, "*dims E"]:
        """Returns the embeddings of codes, of the tuned model and then of the base."""
        return jnp.concatenate([self.tuned.embed_codes(codes), self.base.embed_codes(codes)], axis=-1)

    def step_state(
        self, hidden: Float[Array, "R E"], cache: Cache, position: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R D"], Cache]:
        """Runs the base, or, with features, the tuned model, at one position; the other's cache stays."""
        return self._run("step_state", hidden, cache, position, features)

    def step_states(
        self, hidden: Float[Array, "R S E"], cache: Cache, first: Int[Array, "*R"], features: Any = None
    ) -> tuple[Float[Array, "R S D"], Cache]:
        """Runs the same at several positions."""
        return self._run("step_states", hidden, cache, first, features)

    def _run(self, name: str, hidden: Array, cache: Cache, at: Array, features: Any) -> tuple[Array, Cache]:
        (of_tuned, of_base), (tuned, base) = jnp.split(hidden, 2, axis=-1), cache
        if features is None:
            states, base = getattr(self.base, name)(of_base, base, at)
        else:
            states, tuned = getattr(self.tuned, name)(of_tuned, tuned, at, features)
        return states, (tuned, base)

    def step(
        self, hidden: Float[Array, "R E"], cache: Cache, position: Int[Array, ""], features: Any = None
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Returns the tuned model's logits of one position, and the cache; the base's stays."""
        logits, tuned = self.tuned.step(jnp.split(hidden, 2, axis=-1)[0], cache[0], position, features)
        return logits, (tuned, cache[1])

    def states(
        self, condition: Condition, codes: Int[Array, "B T"], neighbors: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the base's states of all positions."""
        return self.base.states(condition, codes)

    def logits(self, state: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        """Returns the logits that the tuned model's states predict."""
        return self.tuned.logits(state)

    def teacher_forced(
        self, condition: Condition, codes: Int[Array, "B T"], neighbors: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T V"]:
        """Returns the tuned model's logits of all positions."""
        return self.tuned.teacher_forced(condition, codes, neighbors)
