"""Trains the VQ tokenizer of the emoji scenes: 48 x 48 pixels → 12 x 12 codes out of 512.

python -m arrag_jax.train --config configs/emoji_tokenizer.py --workdir runs/tokenizer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the embedded checkpoint's tokenizer."""
    return ConfigDict(
        {
            "task": "tokenizer",
            "steps": 1200,
            "batch_size": 16,
            "data": {"source": "emoji_scenes/full"},
            "optimizer": {"learning_rate": 1.5e-3, "warmup_steps": 50, "decay_fraction": 0.4},
            "options": {"preset": "janus-emoji", "commitment": 0.25},
            "eval_every": 200,
            "checkpoint_every": 200,
        }
    )
