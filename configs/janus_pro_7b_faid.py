"""Trains FAiD on Janus-Pro-7B with the settings of configs/janus_pro_1b_faid.py, one image per chip of a v5e-256.

python -m arrag_jax.train --config configs/janus_pro_7b_faid.py --workdir /shared/faid
python -m arrag_jax.train --config configs/janus_pro_7b_faid.py --workdir runs/dry --topology=v5e:16x16

It needs a checkpoint folder of Janus-Pro-7B and neighbour sets of its codes. Parameters, optimizer state and gradients
are split over all 256 chips, and a layer is computed again in the backward pass. The second command says what it needs,
without a TPU or a checkpoint. We have not run this yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/janus_pro_1b_faid.py for the larger model."""
    config = runpy.run_path(str(Path(__file__).with_name("janus_pro_1b_faid.py")))["get_config"]()
    config.accumulate, config.remat = 1, "full"
    options = config.options
    options.base, options.neighbors = "checkpoints/janus-pro-7b", "neighbors/janus-pro-7b"
    options.retrieval.store = "stores/janus-pro-7b"
    return config
