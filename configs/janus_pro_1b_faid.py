"""Trains FAiD on Janus-Pro-1B with the paper's settings: 50,000 pairs, one epoch of batches of 256, bfloat16.

python -m arrag_jax.train --config configs/janus_pro_1b_faid.py --workdir /shared/faid

It needs a checkpoint folder of Janus-Pro-1B and neighbour sets of its 24 x 24 codes with K = 10, which
configs/janus_pro_1b_neighbors.py makes. For a TPU pod see launch/tpu_pod.sh. Source: docs/reference.md "FAiD". LoRA,
learning rate and clipping are those of the official script, and so is the learning rate's constant value after warm-up.
AdamW, warm-up, batch size and number of pairs are those of the paper, quoted third-hand. One difference from the
official code is deliberate: captions are dropped for guidance, which the official code no longer does. We have not run
this yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; it trains 289M parameters: 226M in blenders, 25M in LoRA, 38M in the head."""
    return ConfigDict(
        {
            "task": "faid",
            "steps": 195,
            "batch_size": 256,
            "accumulate": 2,
            "compute_dtype": "bfloat16",
            "remat": "dots",
            "optimizer": {
                "learning_rate": 2e-4, "warmup_steps": 20, "decay_fraction": 0.0, "weight_decay": 0.01,
                "b2": 0.999, "clip_norm": 1.0,
            },
            "mesh": {"data": 1, "fsdp": -1},
            "options": {
                "base": "checkpoints/janus-pro-1b",
                "neighbors": "neighbors/janus-pro-1b",
                "retrieval": {"store": "stores/janus-pro-1b", "k": 2048, "keys": "latent"},
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
