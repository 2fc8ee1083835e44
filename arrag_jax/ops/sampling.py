"""Turns logits into a drawn code: guidance, temperature, truncation, the neighbours' distribution, mixing, drawing.

All values are float32 and in log space. A code with the value -inf cannot be drawn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from arrag_jax.ops.neighbors import Neighbors


def guide(
    logits: Float[Array, "R V"],
    scale: float | Float[Array, ""] | None,
    interval: int | Int[Array, ""] = -1,
    position: int | Int[Array, "*n"] = 0,
) -> Float[Array, "B V"]:
    """Returns the logits after classifier-free guidance: uncond + scale · (cond − uncond).

    Source of the interval: LlamaGen's sampler, docs/reference.md "Guidance and drawing".

    Args:
      logits: the conditional rows, then the unconditional rows (R = 2B).
      scale: scale of the guidance; None = no guidance, and ``logits`` holds only conditional rows (R = B).
      interval: k; positions above k + 1 keep the conditional logits. -1 = every position is guided.
      position: the position in the grid that the logits predict, one for all rows or one per row.
    """
    if scale is None:
        return logits
    cond, uncond = jnp.split(logits, 2)
    within = (jnp.asarray(interval) < 0) | (jnp.asarray(position) <= jnp.asarray(interval) + 1)
    return jnp.where(within[..., None], uncond + scale * (cond - uncond), cond)


def truncate(
    logits: Float[Array, "B V"],
    temperature: float | Float[Array, ""],
    top_k: int | None,
    top_p: float | Float[Array, ""] | None,
) -> Float[Array, "B V"]:
    """Returns log-probabilities after temperature, top-k and top-p (nucleus) truncation, in this order, renormalised.

    Args:
      top_k: keep the k most probable codes; among equal ones those with lower numbers. None = all codes.
      top_p: keep the fewest codes whose probabilities sum to at least this, and at least one code. None = all codes.
    """
    log_p = jax.nn.log_softmax(logits / temperature)
    if top_k is not None:
        best = jax.lax.top_k(log_p, top_k)[1]
        log_p = _renormalized(log_p, best, jnp.ones(best.shape, bool))
    if top_p is not None:
        order = jnp.argsort(log_p, axis=-1, descending=True)
        p = jnp.exp(jnp.take_along_axis(log_p, order, axis=-1))
        log_p = _renormalized(log_p, order, jnp.cumsum(p, axis=-1) - p < top_p)
    return log_p


def _renormalized(log_p: Float[Array, "B V"], code: Int[Array, "B n"], kept: Bool[Array, "B n"]) -> Float[Array, "B V"]:
    """Returns log-probabilities over the kept codes only, renormalised.

    Codes are selected by number and not by a bound on the log-probability. A compiler may compute log-probabilities
    twice with different rounding, and then the smallest kept one could fall below a bound made from itself.
    """
    rows = jnp.arange(len(log_p))[:, None]
    keep = jnp.zeros(log_p.shape, bool).at[rows, code].set(kept)
    return jax.nn.log_softmax(jnp.where(keep, log_p, -jnp.inf))


def neighbor_log_probs(
    neighbors: Neighbors, codebook_size: int, temperature: float | Float[Array, ""], reduction: str
) -> Float[Array, "B V"]:
    """Returns the log-probabilities over codes that the neighbours give; -inf everywhere in rows without neighbours.

    Source: docs/reference.md "DAiD", and quirk 21 for ``reduction="max"``.

    Args:
      temperature: τ, in units of squared L2 distance.
      reduction: how copies of one code count. "max": only the nearest copy counts, which gives softmax(−d/τ) over the
        distinct codes. "sum": every copy counts, which gives each code its share of Σ exp(−d/τ).
    """
    batch, _ = neighbors.code.shape
    score = -neighbors.distance / temperature
    code = jnp.where(neighbors.code < 0, codebook_size, neighbors.code)  # out of range, hence dropped
    rows = jnp.arange(batch)[:, None]
    if reduction == "max":
        total = jnp.full((batch, codebook_size), -jnp.inf).at[rows, code].max(score, mode="drop")
    else:
        best = jnp.max(score, axis=1, keepdims=True)
        weight = jnp.exp(score - jnp.where(jnp.isfinite(best), best, 0.0))
        total = jnp.log(jnp.zeros((batch, codebook_size)).at[rows, code].add(weight, mode="drop"))
    return jnp.where(jnp.any(neighbors.code >= 0, axis=1, keepdims=True), jax.nn.log_softmax(total), -jnp.inf)


def shares(neighbors: Neighbors, temperature: float | Float[Array, ""]) -> Float[Array, "B K"]:
    """Returns softmax(−d/τ) over the neighbours of each row; 0 in empty slots."""
    score = -neighbors.distance / temperature
    best = jnp.max(score, axis=1, keepdims=True)
    weight = jnp.exp(score - jnp.where(jnp.isfinite(best), best, 0.0))
    return weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-30)


def mix(
    log_p: Float[Array, "B V"], log_q: Float[Array, "B V"], weight: Any, where: Bool[Array, " B"]
) -> Float[Array, "B V"]:
    """Returns log((1 − weight) p + weight q) in the rows ``where``, and log p in the others.

    Weight 0 returns exactly log p, bit by bit.

    Args:
      weight: one number, or one per row.
    """
    weight = jnp.asarray(weight, jnp.float32)
    weight = weight[:, None] if weight.ndim else weight
    mixed = jnp.logaddexp(jnp.log1p(-weight) + log_p, jnp.log(weight) + log_q)
    return jnp.where(where[:, None], mixed, log_p)


def without(
    log_p: Float[Array, "B V"], logits: Float[Array, "B V"], forbidden: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Returns log-probabilities without the forbidden codes, renormalised; rows that allow all codes do not change.

    Args:
      logits: what is left of these is drawn from in rows where ``log_p`` has forbidden codes alone.
    """
    rest = jnp.where(forbidden, -jnp.inf, log_p)
    rest = jnp.where(jnp.isneginf(rest).all(1, keepdims=True), jnp.where(forbidden, -jnp.inf, logits), rest)
    return jnp.where(forbidden.any(1, keepdims=True), jax.nn.log_softmax(rest), log_p)


def draw(
    log_p: Float[Array, "B V"], keys: Key[Array, " B"], position: Int[Array, "*B"], greedy: bool
) -> Int[Array, " B"]:
    """Returns one drawn code per row: the argmax of its log-probabilities plus Gumbel noise.

    The noise depends on the row's random key and its position alone. So an image does not depend on the other images of
    its batch, and a position that is drawn again from the same distribution gets the same code.

    Args:
      position: number of the position: one for all rows, or one per row.
    """
    if greedy:
        return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(position, keys.shape))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_p.shape[1:]))(keys)
    return jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)
