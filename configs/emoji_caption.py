"""Compares caption-aware DAiD and the static image-level baseline with plain and DAiD, with the embedded checkpoint.

python -m arrag_jax.eval --config configs/emoji_caption.py --workdir runs/caption --num_scenes=300 --num_prompts=120
python -m arrag_jax.generate --config configs/emoji_caption.py --prompt "a cat" --method static --workdir pictures

The datastore must hold captions; the one of configs/emoji_datastore.py does.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_daid.py with the two methods that select images by their captions.

    Their settings were chosen on the validation split, too.
    """
    config = runpy.run_path(str(Path(__file__).with_name("emoji_daid.py")))["get_config"]()
    config.methods = ("plain", "static", "daid", "caption")
    config.caption = {
        "images": 1024,
        "static_images": 4,
        "daid": {"weight": 0.02, "temperature": 0.003, "reduction": "sum"},
    }
    return config
