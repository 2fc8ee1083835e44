"""Decides how far retrieval is trusted: a gate turns features of a position into a factor on DAiD's weight.

A feature is one number per row, such as the surprise of the codes that were found. Each feature f has a slope a and a
threshold t, and contributes σ(a (f - t)). The factor is the product of these contributions, or σ of the sum of all
a (f - t), as in adaptive kNN-MT (arXiv 2105.13022). A factor below ``CLOSED`` counts as 0, so that a closed gate leaves
the model's distribution unchanged to the bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrag_jax.errors import UserError
from arrag_jax.ops.keys.hidden import EXCESS_STEP, SURPRISE_STEP
from arrag_jax.ops.neighbors import Neighbors

CLOSED = 1e-3


class Seen(NamedTuple):
    """What a feature may read about n rows.

    Attributes:
      log_p: the model's log-probabilities.
      neighbors: the neighbours found.
      share: each neighbour's share, softmax(-d/τ); 0 in empty slots.
      log_q: the neighbours' log-probabilities; -inf everywhere in rows without neighbours.
    """

    log_p: Float[Array, "n V"]
    neighbors: Neighbors
    share: Float[Array, "n K"]
    log_q: Float[Array, "n V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Knowledge:
    """What a store tells about its codes (``ops.keys.hidden.Told``), as tables that features read.

    Attributes:
      surprise: uint8 [N] by stored row, in steps of ``SURPRISE_STEP`` bits.
      excess: int8 [N] by stored row, in steps of ``EXCESS_STEP`` bits.
      image_surprise, image_excess: float32 [n] by image, in bits per code.
      per_image: number of stored rows per image.
    """

    surprise: Any
    excess: Any
    image_surprise: Any
    image_excess: Any
    per_image: int = dataclasses.field(metadata={"static": True})


def _of_row(name: str, step: float) -> Callable[["Gate", Seen], Array]:
    def feature(gate: "Gate", seen: Seen) -> Array:
        rows = jnp.maximum(jnp.asarray(seen.neighbors.id), 0)
        return (seen.share * jnp.take(getattr(gate.known, name), rows).astype(jnp.float32)).sum(1) * step

    return feature


def _of_image(name: str) -> Callable[["Gate", Seen], Array]:
    def feature(gate: "Gate", seen: Seen) -> Array:
        images = jnp.maximum(jnp.asarray(seen.neighbors.id), 0) // gate.known.per_image
        return (seen.share * jnp.take(getattr(gate.known, name), images)).sum(1)

    return feature


def _of_prompt(name: str) -> Callable[["Gate", Seen], Array]:
    def feature(gate: "Gate", seen: Seen) -> Array:
        given = gate.prompt[name]  # the rows of one prompt are consecutive
        return jnp.repeat(given, len(seen.log_p) // len(given), total_repeat_length=len(seen.log_p))

    return feature


def _entropy(gate: "Gate", seen: Seen) -> Array:
    return -jnp.where(jnp.isneginf(seen.log_p), 0, jnp.exp(seen.log_p) * seen.log_p).sum(1) / jnp.log(2.0)


def _disagreement(gate: "Gate", seen: Seen) -> Array:
    """Returns KL(retrieved ‖ model) in bits; the model's log-probabilities are cut off at ``FLOOR``."""
    apart = seen.log_q - jnp.maximum(seen.log_p, FLOOR)
    return jnp.where(jnp.isneginf(seen.log_q), 0, jnp.exp(seen.log_q) * apart).sum(1) / jnp.log(2.0)


def _distance(gate: "Gate", seen: Seen) -> Array:
    return jnp.where(jnp.isinf(seen.neighbors.distance[:, 0]), FAR, seen.neighbors.distance[:, 0])


FLOOR = -20.0  # nats
FAR = 1e6  # the distance of a row without neighbours
# name → function from a gate and rows to one number per row
FEATURES: dict[str, Callable[["Gate", Seen], Array]] = {
    "surprise": _of_row("surprise", SURPRISE_STEP),  # bits of the neighbours' codes under the model
    "excess": _of_row("excess", EXCESS_STEP),  # the same minus the model's entropy there
    "image_surprise": _of_image("image_surprise"),  # mean bits per code of the neighbours' images
    "image_excess": _of_image("image_excess"),
    "prompt_surprise": _of_prompt("prompt_surprise"),  # the same for the images whose captions are near the prompt
    "prompt_excess": _of_prompt("prompt_excess"),
    "caption": _of_prompt("caption"),  # cosine of the prompt and the nearest stored caption
    "distance": _distance,  # squared distance of the nearest neighbour; give it a negative slope
    "entropy": _entropy,  # bits of the model's distribution
    "disagreement": _disagreement,  # KL(retrieved ‖ model) in bits
}
OF_PROMPT = ("prompt_surprise", "prompt_excess", "caption")
OF_STORE = ("surprise", "excess", "image_surprise", "image_excess")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """A gate with all that its features read; a pytree.

    Attributes:
      slopes, thresholds: float32 [F], one number per feature.
      known: tables of the store; None if no feature reads them.
      prompt: name → float32 [B], the features of B prompts.
      features: names from ``FEATURES``.
      combine: "product" or "sum".
    """

    slopes: Any
    thresholds: Any
    known: Any
    prompt: Any
    features: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    combine: str = dataclasses.field(default="product", metadata={"static": True})

    def factor(self, seen: Seen) -> Float[Array, " n"]:
        """Returns the factor of each row, in [0, 1]; 0 where the gate is closed."""
        terms = [
            self.slopes[i] * (FEATURES[name](self, seen) - self.thresholds[i]) for i, name in enumerate(self.features)
        ]
        stacked = jnp.stack(terms)
        factor = jax.nn.sigmoid(stacked.sum(0)) if self.combine == "sum" else jax.nn.sigmoid(stacked).prod(0)
        return jnp.where(factor < CLOSED, 0.0, factor)

    def require_rows(self, batch: int) -> None:
        """Raises UserError if the gate was made for another number of prompts."""
        for name, given in self.prompt.items():
            if len(given) != batch:
                raise UserError(
                    f"the gate's {name} has {len(given)} numbers for {batch} prompts; make it for these prompts"
                )
