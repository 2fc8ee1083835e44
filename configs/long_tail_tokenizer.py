"""Trains the VQ tokenizer of the long-tailed emoji scenes: 48 x 48 pixels → 12 x 12 codes out of 1024.

It starts from the embedded one, whose 512 codes keep their numbers.

python -m arrag_jax.train --config configs/long_tail_tokenizer.py --workdir runs/long_tail_tokenizer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; the tokenizer sees all classes alike, also those that the prior never sees."""
    return ConfigDict(
        {
            "task": "tokenizer",
            "steps": 1600,
            "batch_size": 16,
            "data": {"source": "emoji_scenes/long_tail", "train_split": "sprites"},
            "optimizer": {"learning_rate": 7e-4, "warmup_steps": 50, "decay_fraction": 0.4},
            "options": {"preset": "janus-long-tail", "commitment": 0.25},
            "init_from": "arrag_jax/assets/emoji_janus",
            "eval_every": 200,
            "checkpoint_every": 200,
        }
    )
