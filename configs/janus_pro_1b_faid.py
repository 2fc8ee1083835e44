"""FAiD on Janus-Pro-1B with the paper's settings: 50,000 pairs, one epoch of batches of 256, bfloat16.

python -m arrag_jax.train --config configs/janus_pro_1b_faid.py --workdir /shared/faid

Needs a checkpoint folder of Janus-Pro-1B and neighbour sets of its 24 x 24 codes with K = 10, which
configs/janus_pro_1b_neighbors.py makes; for a pod see launch/tpu_pod.sh. Source: docs/reference.md "FAiD" (LoRA,
learning rate, clipping: the official script; AdamW, warm-up, batch, pairs: the paper, third-hand). Where the official
code differs on purpose: captions are dropped for guidance (it lost that), and a learning rate that stays constant after
its warm-up is the script's. Not run by us yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """289M trained parameters: 226M in blenders, 25M in LoRA, 38M in the head."""
    return ConfigDict(
        {
            "task": "faid",
            "steps": 195,
            "batch_size": 256,
            "accumulate": 4,
            "compute_dtype": "bfloat16",
            "optimizer": {
                "learning_rate": 2e-4, "warmup_steps": 20, "decay_fraction": 0.0, "weight_decay": 0.01,
                "b2": 0.999, "clip_norm": 1.0,
            },
            "mesh": {"data": -1, "fsdp": 1},
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
