"""Draws emoji scenes whose pairs training never showed, from a store that holds such pairs.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/knowledge \
    --config.num_images=8000 --config.keys=codebook,hidden --config.indexes=codebook,hidden
python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/knowledge --append \
    --config.split=knowledge --config.num_images=2000 --config.keys=codebook,hidden --config.indexes=codebook,hidden
python -m arrag_jax.eval --config configs/emoji_knowledge.py --benchmark emoji_scenes --workdir runs/knowledge_eval
python -m arrag_jax.generate --config configs/emoji_knowledge.py --prompt "a red cup" --method gated --workdir pictures
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_daid.py with the methods that search by the backbone's hidden states."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_daid.py")))["get_config"]()
    config.methods = ("plain", "daid", "hidden", "gated")
    config.retrieval.store = "runs/knowledge"
    config.hidden = {
        "k": 64,
        "daid": {"weight": 0.9, "temperature": 0.02, "reduction": "sum"},
        "gated": {
            "weight": 0.99,
            "temperature": 0.02,
            "reduction": "sum",
            "gate": {
                "features": ("surprise", "prompt_excess"),
                "slopes": (6.0, 20.0),
                "thresholds": (0.7, 0.1),
            },
        },
    }
    return config
