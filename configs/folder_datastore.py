"""Datastore of a folder of images (and of the webdataset tars in it), or of one tar, with the embedded tokenizer.

python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos

For Janus-Pro's tokenizer (24 x 24 codes of 384 x 384 pixels; seconds an image on CPU cores, so in small shards, for a
killed build begins its shard again):

  --config.model=checkpoints/janus-pro-1b --config.batch_size=8 --config.shard_size=1024
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """``source`` must be given; one image in a hundred may be unreadable, of few images up to ten (one in twenty)."""
    return ConfigDict(
        {
            "model": "arrag_jax/assets/emoji_janus",
            "source": "",
            "num_images": 0,
            "max_bad_fraction": 0.01,
            "batch_size": 64,
            "shard_size": 16_384,
            "keys": ("codebook",),
            "indexes": ("codebook",),
        }
    )
