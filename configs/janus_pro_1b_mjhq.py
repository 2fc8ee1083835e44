"""MJHQ-30K with Janus-Pro-1B: 30,000 images for FID, CMMD and FWD; plain, with DAiD and with FAiD.

python -m arrag_jax.eval --config configs/janus_pro_1b_mjhq.py --benchmark distances --draw_only --method plain \\
  --prompts MJHQ-30K/meta_data.json --workdir runs/mjhq_plain
python -m arrag_jax.eval --config configs/janus_pro_1b_mjhq.py --benchmark distances --draw_only --method daid \\
  --prompts MJHQ-30K/meta_data.json --workdir runs/mjhq_daid
python -m arrag_jax.eval --config configs/janus_pro_1b_mjhq.py --benchmark distances --draw_only --method faid \\
  --config.faid_model=checkpoints/faid-1b \\
  --prompts MJHQ-30K/meta_data.json --workdir runs/mjhq_faid
python -m arrag_jax.eval --benchmark distances --score_only \\
  --reference MJHQ-30K/images --workdir runs/mjhq_plain
python -m arrag_jax.eval --compare runs/mjhq_plain runs/mjhq_daid

Sampling is that of configs/janus_pro_1b.py: guidance 5, temperature 1, no truncation, 384 x 384. Which images the
AR-RAG paper calls Midjourney-30K, and with which sampling and which resize its FID was made, is not established. λ and
τ are starting points. We have not run this on the published weights.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/janus_pro_1b.py with batches of 32 images."""
    config = runpy.run_path(str(Path(__file__).with_name("janus_pro_1b.py")))["get_config"]()
    config.batch_size = 32
    return config
