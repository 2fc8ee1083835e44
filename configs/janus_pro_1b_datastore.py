"""Datastore of a folder of images (or tars, or tfds:NAME) in Janus-Pro's codes, with the keys that its configs search.

python -m arrag_jax.build_datastore --config configs/janus_pro_1b_datastore.py --config.source=photos \
  --workdir stores/janus-pro-1b

Model: checkpoints/janus-pro-1b (24 x 24 codes of 384 x 384 pixels; seconds an image on CPU cores). Keys: "latent",
which configs/janus_pro_1b.py, janus_pro_1b_neighbors.py and janus_pro_1b_faid.py search, and "codebook". A store that
has "codebook" alone (configs/folder_datastore.py) is given the others later:

python -m arrag_jax.build_datastore --config.keys=codebook,latent --config.indexes=latent --workdir stores/janus-pro-1b
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """configs/folder_datastore.py in small shards, because a killed build begins its shard again."""
    config = runpy.run_path(str(Path(__file__).with_name("folder_datastore.py")))["get_config"]()
    config.model = "checkpoints/janus-pro-1b"
    config.update(batch_size=8, shard_size=1024)
    del config["keys"]  # whose name is a method's as well
    config["keys"] = ("codebook", "latent")
    config.indexes = ("latent",)
    return config
