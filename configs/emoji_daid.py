"""Generates emoji scenes with the embedded checkpoint, plain and with DAiD.

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --workdir pictures
python -m arrag_jax.eval --config configs/emoji_daid.py --benchmark emoji_scenes --workdir runs/eval
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; λ, τ, K, the reduction and the sampling were chosen on the validation split (docs/LOG.md)."""
    return ConfigDict(
        {
            "model": "arrag_jax/assets/emoji_janus",
            "retrieval": {"store": "runs/store", "k": 128},
            "daid": {"weight": 0.01, "temperature": 0.003, "reduction": "sum"},
            "sampling": {"cfg_scale": 1.5, "top_p": 0.9},
            "data": {"source": "emoji_scenes/full"},
        }
    )
