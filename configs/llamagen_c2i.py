"""Drawing ImageNet classes with LlamaGen: plain from its checkpoint alone, DAiD with a datastore of its codes.

python -m arrag_jax.generate --config configs/llamagen_c2i.py --prompt 360 --prompt 207 --method plain

A prompt is the number of a class (360 is an otter). The folder holds c2i_B_256.pt and vq_ds16_c2i.pt as published, or
what ``arrag_jax.convert`` makes of them, and a config.json: {"model_type": "llamagen", "family": "c2i", "dim": 768,
"n_layer": 12, "n_head": 12, "grid": 16}. Guidance 2 is the official one of this size. λ and τ are a place to start
from. Not run by us on the published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Larger models differ in the folder and in guidance: 1.75 of XL and XXL, 1.65 of 3B."""
    return ConfigDict(
        {
            "model": "checkpoints/llamagen-c2i-b",
            "retrieval": {"store": "stores/llamagen-c2i", "k": 2048},
            "daid": {"weight": 0.1, "temperature": 0.05},
            "sampling": {"cfg_scale": 2.0, "temperature": 1.0},
            "batch_size": 8,
        }
    )
