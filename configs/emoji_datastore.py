"""Datastore of the 120,000 emoji scenes that no model was trained on: 13.2 million patches.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings of the emoji datastore."""
    return ConfigDict(
        {
            "model": "runs/tokenizer/export",
            "source": "emoji_scenes/full",
            "split": "store",
            "keys": ("codebook",),
            "indexes": ("codebook",),
        }
    )
