"""Prior over the codes of a captioned folder or tar, with the tokenizer of configs/folder_tokenizer.py.

python -m arrag_jax.train --config configs/folder_prior.py --config.data.source=photos \
  --workdir runs/photo_prior

2 CPU cores, about 8 minutes of them. The vocabulary is the words of the captions. Of 200 photos (160 to learn from),
with --config.steps=60: "trained 60 steps; held out: valid_bits_per_code 8.334". The 300 steps were not run by us.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """``data.source`` must be given; its last 40 images, in the order of their paths, are held out."""
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
