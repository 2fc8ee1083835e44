"""Datastore of 107,712 emoji scenes (11.8 million patches) that no model was trained on; the prior saw 100,000 others.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the emoji datastore."""
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
