"""Drawing with Janus-Pro-1B: plain from its checkpoint alone, DAiD with a datastore of its codes beside it.

python -m arrag_jax.generate --config configs/janus_pro_1b.py --prompt "a red car on a beach" --method plain

The datastore is the one of configs/janus_pro_1b_datastore.py: of this model's codes, searched by keys of kind "latent".
Guidance 5 at temperature 1 and K = 2048 are the reference's; its λ and τ are not published, so those here are a place
to start from. Not run by us on the published weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """For FAiD give its checkpoint as ``--config.faid_model``."""
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
