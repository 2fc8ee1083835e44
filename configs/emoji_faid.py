"""Trains FAiD on the embedded checkpoint: LoRA, two blenders and the head learn from scenes that the prior never saw.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
python -m arrag_jax.train --config configs/emoji_faid.py --workdir runs/faid
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the small FAiD."""
    return ConfigDict(
        {
            "task": "faid",
            "steps": 400,
            "batch_size": 16,
            "data": {"eval_examples": 256},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 40, "decay_fraction": 0.5},
            "options": {
                "base": "arrag_jax/assets/emoji_janus",
                "neighbors": "runs/neighbors",
                "retrieval": {"store": "runs/store", "k": 128},
                "faid": {"stride": 3, "hops": (1, 2), "neighbors": 16},
                "lora": {"rank": 16, "alpha": 32.0},
                "start_silent": True,
                "prompt_length": 16,
                "daid": {"weight": 0.01, "temperature": 0.003, "reduction": "sum"},
                "sampling": {"cfg_scale": 1.5, "top_p": 0.9},
            },
            "eval_every": 200,
            "checkpoint_every": 100,
        }
    )
