"""GenEval with Janus-Pro-1B: 553 prompts, 4 images each; drawn plain, with DAiD and with FAiD, then scored.

python -m arrag_jax.eval --config configs/janus_pro_1b_geneval.py --benchmark geneval --draw_only --method plain \\
  --prompts geneval/prompts/evaluation_metadata.jsonl --workdir runs/geneval_plain
python -m arrag_jax.eval --config configs/janus_pro_1b_geneval.py --benchmark geneval --draw_only --method daid \\
  --prompts geneval/prompts/evaluation_metadata.jsonl --workdir runs/geneval_daid
python -m arrag_jax.eval --config configs/janus_pro_1b_geneval.py --benchmark geneval --draw_only --method faid \\
  --config.faid_model=checkpoints/faid-1b \\
  --prompts geneval/prompts/evaluation_metadata.jsonl --workdir runs/geneval_faid
python -m arrag_jax.eval --benchmark geneval --score_only --detector file:found.jsonl \\
  --workdir runs/geneval_plain
python -m arrag_jax.eval --compare runs/geneval_plain runs/geneval_daid

Sampling is that of configs/janus_pro_1b.py: guidance 5, temperature 1, no truncation, 384 x 384, as in Janus' own
script. Its report gives 0.73 for this checkpoint; it publishes neither seeds nor the script of that evaluation.
GenEval's own generator uses PyTorch's random numbers, with seed 42 for every prompt, so its images cannot be drawn
here. λ and τ are starting points. We have not run this on the published weights.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/janus_pro_1b.py with batches of 32 images."""
    config = runpy.run_path(str(Path(__file__).with_name("janus_pro_1b.py")))["get_config"]()
    config.batch_size = 32
    return config
