"""Finds neighbours (K = 10) of every captioned image of a folder for configs/janus_pro_1b_faid.py.

python -m arrag_jax.build_neighbors --config configs/janus_pro_1b_neighbors.py --config.source=pairs \
  --workdir neighbors/janus-pro-1b

``pairs`` is a folder of images, each with a .txt or .json file next to it, in subfolders or webdataset tars; tfds:NAME
works, too. The last 512 images are held out. The paper tunes on 50,000 images. The datastore is the one of
configs/janus_pro_1b_datastore.py, searched by keys of kind "latent". Retrieval is leave-one-out: an image that the
datastore read from the same path gets no patches of itself. We have not run this on the published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; ``source`` must be given. Shards are small, because a killed build repeats its shard."""
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
