"""Generates images of ImageNet classes with LlamaGen; plain needs only its checkpoint, DAiD a datastore of its codes.

python -m arrag_jax.generate --config configs/llamagen_c2i.py --prompt 360 --prompt 207 --method plain

A prompt is the number of a class (360 is an otter). The checkpoint folder holds the published c2i_B_256.pt and
vq_ds16_c2i.pt, or what ``arrag_jax.convert`` makes of them, and a config.json: {"model_type": "llamagen",
"family": "c2i", "dim": 768, "n_layer": 12, "n_head": 12, "grid": 16}. Guidance 2 is the official value for this size.
λ and τ are only a starting point. We have not run this on the published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config. Larger models need another folder and guidance: 1.75 for XL and XXL, 1.65 for 3B."""
    return ConfigDict(
        {
            "model": "checkpoints/llamagen-c2i-b",
            "retrieval": {"store": "stores/llamagen-c2i", "k": 2048},
            "daid": {"weight": 0.1, "temperature": 0.05},
            "sampling": {"cfg_scale": 2.0, "temperature": 1.0},
            "batch_size": 8,
        }
    )
