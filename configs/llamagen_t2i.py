"""Generates images of captions with LlamaGen; plain needs only its checkpoint, DAiD a datastore of its codes.

python -m arrag_jax.generate --config configs/llamagen_t2i.py --prompt "a red car on a beach" --method plain

The checkpoint folder holds:
  - the published t2i_XL_stage1_256.pt and vq_ds16_t2i.pt, or what ``arrag_jax.convert`` makes of them;
  - a config.json: {"model_type": "llamagen", "family": "t2i", "dim": 1280, "n_layer": 36, "n_head": 20, "grid": 16},
    with "grid": 32 for t2i_XL_stage2_512.pt;
  - flan-t5-xl as the folder t5, or features.npz with the features of your captions.

Guidance 7.5 and top-k 1000 are the official values. λ and τ are only a starting point. We have not run this on the
published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; the text encoder runs in float32, whatever ``dtype`` is."""
    return ConfigDict(
        {
            "model": "checkpoints/llamagen-t2i-xl",
            "dtype": "bfloat16",
            "retrieval": {"store": "stores/llamagen-t2i", "k": 2048},
            "daid": {"weight": 0.1, "temperature": 0.05},
            "sampling": {"cfg_scale": 7.5, "temperature": 1.0, "top_k": 1000},
            "batch_size": 1,
        }
    )
