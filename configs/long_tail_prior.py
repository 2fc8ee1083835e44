"""Trains the prior over codes of long-tailed emoji scenes: some classes have 10 to 30 training scenes, others none.

Its vocabulary has words for all classes, so that a prompt can ask for an absent one. It starts from the embedded prior,
whose words and codes it keeps.

python -m arrag_jax.train --config configs/long_tail_prior.py --workdir runs/long_tail_prior
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config. It measures bits per code on scenes as frequent as those that it learns from."""
    return ConfigDict(
        {
            "task": "prior",
            "steps": 4000,
            "batch_size": 16,
            # Two thirds of valid show classes of the tail and absent ones; their bits say little about the training.
            "data": {"source": "emoji_scenes/long_tail", "eval_split": "store[:512]"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "decay_fraction": 0.5},
            "options": {"preset": "janus-long-tail", "tokenizer": "runs/long_tail_tokenizer/export"},
            "init_from": "arrag_jax/assets/emoji_janus",
            "ema_decay": 0.99,
            "eval_every": 500,
            "checkpoint_every": 100,
        }
    )
