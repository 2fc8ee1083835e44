"""DPG-Bench with Janus-Pro-1B: 1,065 prompts, 4 images each; drawn plain, with DAiD and with FAiD, then scored.

python -m arrag_jax.eval --config configs/janus_pro_1b_dpg.py --benchmark dpg --draw_only --method plain \\
  --prompts dpg_bench/prompts --workdir runs/dpg_plain
python -m arrag_jax.eval --config configs/janus_pro_1b_dpg.py --benchmark dpg --draw_only --method daid \\
  --prompts dpg_bench/prompts --workdir runs/dpg_daid
python -m arrag_jax.eval --config configs/janus_pro_1b_dpg.py --benchmark dpg --draw_only --method faid \\
  --config.faid_model=checkpoints/faid-1b \\
  --prompts dpg_bench/prompts --workdir runs/dpg_faid
python -m arrag_jax.eval --benchmark dpg --score_only \\
  --questions dpg_bench/dpg_bench.csv --answers file:answers.json --official_bugs --workdir runs/dpg_plain
python -m arrag_jax.eval --compare runs/dpg_plain runs/dpg_daid

Sampling is that of configs/janus_pro_1b.py: guidance 5, temperature 1, no truncation, 384 x 384, as in Janus' own
script. Its report gives 82.63 for this checkpoint, made with mPLUG-large and the official program, whose mistakes
--official_bugs repeats; it publishes neither seeds nor the script of that evaluation. λ and τ are starting points. We
have not run this on the published weights.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/janus_pro_1b.py with batches of 32 images."""
    config = runpy.run_path(str(Path(__file__).with_name("janus_pro_1b.py")))["get_config"]()
    config.batch_size = 32
    return config
