"""From OptimizerConfig to an optax chain: clip by global norm → AdamW or Muon on one schedule."""

import re
from collections.abc import Mapping

import jax
import optax
from jaxtyping import PyTree

from arrag_jax.config import OptimizerConfig
from arrag_jax.errors import UserError

# Matrices whose rows are looked up or compared one by one: orthogonalising them has no meaning.
NOT_FOR_MUON = re.compile(r"embed|head|codebook")
# Muon's updates get AdamW's usual root mean square, so that one learning rate serves both
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0, constant, then linear to 1 % over the last share of the steps."""
    peak, decay = config.learning_rate, round(config.decay_fraction * steps)
    warmup = min(config.warmup_steps, steps - decay)
    parts, ends = [optax.constant_schedule(peak)], []
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup]
    if decay:
        parts, ends = [*parts, optax.linear_schedule(peak, 0.01 * peak, decay)], [*ends, steps - decay]
    return optax.join_schedules(parts, ends)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The chain for a pure dict of trainable arrays; Muon takes its body's matrices, AdamW all else."""
    schedule = make_schedule(config, steps)
    update = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay)
    if config.name == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=config.weight_decay, consistent_rms=MUON_RMS)
        update = optax.partition({"muon": muon, "adamw": update}, muon_labels)
    parts = [optax.clip_by_global_norm(config.clip_norm), update]
    return optax.chain(*parts, *([scale_rates(config.rate_scales)] if config.rate_scales else []))


def scale_rates(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of parameters whose path holds a key of ``scales``; the first such key counts.

    Raises:
      UserError: on ``init``, for a key that no parameter's path holds.
    """

    def key_of(path) -> str | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((key for key in scales if key in name), None)

    def init(params: PyTree) -> optax.EmptyState:
        found = {key_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        for key in scales:
            if key not in found:
                raise UserError(f"optimizer.rate_scales.{key}: no trained parameter is called so")
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        scaled = jax.tree_util.tree_map_with_path(lambda path, leaf: scales.get(key_of(path), 1.0) * leaf, updates)
        return scaled, state

    return optax.GradientTransformation(init, update)


def muon_labels(params: PyTree) -> PyTree:
    """For each leaf, "muon" or "adamw"."""

    def label(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "muon" if leaf.ndim == 2 and not NOT_FOR_MUON.search(name) else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)
