"""Builds a datastore of Janus-Pro's codes from a folder of images, a tar or tfds:NAME, for the configs of Janus-Pro-1B.

python -m arrag_jax.build_datastore --config configs/janus_pro_1b_datastore.py --config.source=photos \
  --workdir stores/janus-pro-1b

The model is checkpoints/janus-pro-1b (24 x 24 codes of 384 x 384 pixels; an image takes seconds on CPU cores). The keys
are of the kinds "latent", which configs/janus_pro_1b.py, janus_pro_1b_neighbors.py and janus_pro_1b_faid.py search, and
"codebook". To add keys of kind "latent" to a datastore that has only "codebook" (configs/folder_datastore.py), run:

python -m arrag_jax.build_datastore --config.keys=codebook,latent --config.indexes=latent --workdir stores/janus-pro-1b
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/folder_datastore.py with small shards, because an interrupted build repeats its current shard."""
    config = runpy.run_path(str(Path(__file__).with_name("folder_datastore.py")))["get_config"]()
    config.model = "checkpoints/janus-pro-1b"
    config.update(batch_size=8, shard_size=1024)
    del config["keys"]  # ``config.keys`` is a method, so the key is set by index
    config["keys"] = ("codebook", "latent")
    config.indexes = ("latent",)
    return config
