"""VQ tokenizer of a folder of photos (and of the tars in it), or of one tar: 48 x 48 pixels → 12 x 12 codes.

python -m arrag_jax.train --config configs/folder_tokenizer.py --config.data.source=photos \
  --workdir runs/photo_tokenizer

2 CPU cores, about 2 minutes of them. Of 200 photos (160 to learn from): "trained 300 steps; held out: psnr_db 22.6564,
codes_used 0.916". A folder without captions will do.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """``data.source`` must be given; its last 40 images, in the order of their paths, are held out."""
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
