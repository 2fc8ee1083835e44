"""Neighbours for FAiD: of 12,288 scenes that neither the prior nor the datastore has, and of 512 validation scenes.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of FAiD's training pairs."""
    return ConfigDict(
        {
            "model": "arrag_jax/assets/emoji_janus",
            "retrieval": {"store": "runs/store", "k": 16, "scann": {"leaves_to_search": 50}},
            "source": "emoji_scenes/full",
            "train_split": "store[107712:]",
            "valid_split": "valid[:512]",
        }
    )
