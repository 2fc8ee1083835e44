"""Builds a datastore of a folder of images (with the webdataset tars in it) or of one tar, with the embedded tokenizer.

python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos

The model is the embedded one. The keys are of kind "codebook", which configs/emoji_daid.py searches. For Janus-Pro's
tokenizer and its configs, which search keys of kind "latent", see configs/janus_pro_1b_datastore.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; ``source`` must be given.

    One image in a hundred may be unreadable. If there are few images, up to ten may be (but at most one in twenty).
    """
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
