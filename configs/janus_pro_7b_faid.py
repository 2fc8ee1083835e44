"""Trains FAiD on Janus-Pro-7B with the settings of configs/janus_pro_1b_faid.py, one image per chip of a v5e-256.

python -m arrag_jax.train --config configs/janus_pro_7b_faid.py --workdir /shared/faid
python -m arrag_jax.train --config configs/janus_pro_7b_faid.py --workdir runs/dry --topology=v5e:16x16

It needs a checkpoint folder of Janus-Pro-7B and neighbour sets of its codes. Parameters, optimizer state and gradients
are split over all 256 chips, and a layer is computed again in the backward pass. The second command says what it needs,
without a TPU or a checkpoint. We have not run this yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    return ConfigDict(
        {
            "task": "faid",
            "steps": 195,
            "batch_size": 256,
            "compute_dtype": "bfloat16",
            "remat": "full",
            "optimizer": {
                "learning_rate": 2e-4, "warmup_steps": 20, "decay_fraction": 0.0, "weight_decay": 0.01,
                "b2": 0.999, "clip_norm": 1.0,
            },
            "mesh": {"data": 1, "fsdp": -1},
            "options": {
                "base": "checkpoints/janus-pro-7b",
                "neighbors": "neighbors/janus-pro-7b",
                "retrieval": {"store": "stores/janus-pro-7b", "k": 2048, "keys": "latent"},
                "faid": {"stride": 12, "hops": (1, 2), "neighbors": 10},
                "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05},
                "prompt_length": 128,
                "sampling": {"cfg_scale": 5.0},
            },
            "data": {"eval_examples": 512},
            "log_every": 5,
            "eval_every": 50,
            "checkpoint_every": 50,
        }
    )  # fmt: skip
