"""Trains a prior over the codes of a folder or tar with captions, with the tokenizer of configs/folder_tokenizer.py.

python -m arrag_jax.train --config configs/folder_prior.py --config.data.source=photos \
  --workdir runs/photo_prior

It takes about 8 minutes on 2 CPU cores. The vocabulary is the words of the captions. On 200 photos (160 for training),
with --config.steps=60, it printed "trained 60 steps; held out: valid_bits_per_code 8.334". We have not run all 300
steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; ``data.source`` must be given, and its last 40 images, sorted by path, are held out."""
    return ConfigDict(
        {
            "task": "prior",
            "steps": 300,
            "batch_size": 16,
            "data": {"source": "", "train_split": "train[:-40]", "eval_split": "train[-40:]"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "decay_fraction": 0.4},
            "options": {"preset": "janus-emoji", "tokenizer": "runs/photo_tokenizer/export", "prompt_length": 64},
            "ema_decay": 0.98,
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
