"""The optimizer of an OptimizerConfig, as an optax chain: clip by global norm → AdamW with one schedule."""

import optax

from arrag_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0, constant, linear to 1 % over the last share of the steps."""
    peak, decay = config.learning_rate, round(config.decay_fraction * steps)
    warmup = min(config.warmup_steps, steps - decay)
    parts, ends = [optax.constant_schedule(peak)], []
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, peak, warmup), *parts], [warmup]
    if decay:
        parts, ends = [*parts, optax.linear_schedule(peak, 0.01 * peak, decay)], [*ends, steps - decay]
    return optax.join_schedules(parts, ends)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optax chain for a pure dict of trainable arrays."""
    update = optax.adamw(make_schedule(config, steps), config.b1, config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
