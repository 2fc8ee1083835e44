"""Datastore of 107,712 emoji scenes that no model was trained on (the prior saw 100,000 others): 11.8 million patches.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of the emoji datastore."""
    return ConfigDict(
        {
            "model": "arrag_jax/assets/emoji_janus",
            "source": "emoji_scenes/full",
            "split": "store",
            "num_images": 107_712,
            "keys": ("codebook",),
            "captions": True,
            "indexes": ("codebook",),
        }
    )
