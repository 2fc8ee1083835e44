"""Neighbours of 12,288 emoji scenes new to the prior and not in the store of 107,712, and of 512 valid scenes.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """FAiD's training pairs."""
    return ConfigDict(
        {
            "model": "arrag_jax/assets/emoji_janus",
            "retrieval": {"store": "runs/store", "k": 16, "scann": {"leaves_to_search": 50}},
            "source": "emoji_scenes/full",
            "train_split": "store[107712:]",
            "valid_split": "valid[:512]",
        }
    )
