"""Compares all methods: the embedded checkpoint, and the models tuned by configs/emoji_faid.py and emoji_lora_only.py.

python -m arrag_jax.eval --config configs/emoji_compare.py --benchmark emoji_scenes --workdir runs/compare
python -m arrag_jax.generate --config configs/emoji_compare.py --prompt "a cat" --method faid+daid --workdir pictures
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_daid.py with the two tuned models."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_daid.py")))["get_config"]()
    config.faid_model = "runs/faid/export"
    config.lora_model = "runs/lora_only/export"
    return config
