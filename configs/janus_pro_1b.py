"""Generates with Janus-Pro-1B; plain needs only its checkpoint, DAiD also a datastore of its codes.

python -m arrag_jax.generate --config configs/janus_pro_1b.py --prompt "a red car on a beach" --method plain

The datastore is the one of configs/janus_pro_1b_datastore.py; it holds this model's codes and is searched by keys of
kind "latent". Guidance 5 at temperature 1 and K = 2048 are the values of the reference. It does not publish λ and τ, so
the values here are only a starting point. We have not run this on the published weights, which
``--config.model=hf:deepseek-ai/Janus-Pro-1B`` fetches from the Hugging Face hub.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; for FAiD, give its checkpoint as ``--config.faid_model``."""
    return ConfigDict(
        {
            "model": "checkpoints/janus-pro-1b",
            "dtype": "bfloat16",
            "retrieval": {"store": "stores/janus-pro-1b", "k": 2048, "keys": "latent"},
            "daid": {"weight": 0.1, "temperature": 0.05},
            "sampling": {"cfg_scale": 5.0, "temperature": 1.0},
            "batch_size": 1,
        }
    )
