"""The control experiment of configs/emoji_faid.py: the same LoRA, head, data and steps, but without retrieval.

python -m arrag_jax.train --config configs/emoji_lora_only.py --workdir runs/lora_only
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_faid.py without the blenders."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_faid.py")))["get_config"]()
    config.options.blend = False
    return config
