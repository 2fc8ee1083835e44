"""Neighbours for configs/janus_pro_1b_faid.py: K = 10 of every captioned image of a folder; its last 512 are held out.

python -m arrag_jax.build_neighbors --config configs/janus_pro_1b_neighbors.py --config.source=pairs \
  --workdir neighbors/janus-pro-1b

``pairs`` holds images with a .txt or .json beside each, in folders or webdataset tars; tfds:NAME does too. The paper
tunes on 50,000. The store is that of configs/janus_pro_1b_datastore.py, searched by keys of kind "latent"; an
image that it holds too, read from the same place, gets no patches of itself. Not run by us on the published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """``source`` must be given; small shards, for a killed build begins its shard again."""
    return ConfigDict(
        {
            "model": "checkpoints/janus-pro-1b",
            "retrieval": {"store": "stores/janus-pro-1b", "k": 10, "keys": "latent"},
            "source": "",
            "train_split": "train[:-512]",
            "valid_split": "train[-512:]",
            "batch_size": 32,
            "shard_size": 1024,
        }
    )
