"""Trains the prior over codes of emoji scenes: a Llama of 2.9M parameters that reads a caption and writes 144 codes.

python -m arrag_jax.train --config configs/emoji_prior.py --workdir runs/prior
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the embedded checkpoint's prior."""
    return ConfigDict(
        {
            "task": "prior",
            "steps": 20400,
            "batch_size": 16,
            "data": {"source": "emoji_scenes/full"},
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 200, "decay_fraction": 0.35},
            "options": {"preset": "janus-emoji", "tokenizer": "runs/tokenizer/export"},
            "ema_decay": 0.998,
            "eval_every": 500,
            "checkpoint_every": 500,
        }
    )
