"""Trains FAiD with neighbours from the store of configs/emoji_knowledge.py, found by the states of the frozen base.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/knowledge_neighbors_hidden \
    --config.source=emoji_scenes/small "--config.train_split=store[8000:]" --config.retrieval.store=runs/knowledge \
    --config.retrieval.keys=hidden
python -m arrag_jax.train --config configs/emoji_knowledge_faid.py --workdir runs/knowledge_faid_hidden

To compare, build runs/knowledge_neighbors with --config.retrieval.keys=codebook, and train with
--config.options.neighbors=runs/knowledge_neighbors --config.options.retrieval.keys=codebook, or with
--config.options.blend=False and without retrieval.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_faid.py with the other store and neighbours."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_faid.py")))["get_config"]()
    config.options.neighbors = "runs/knowledge_neighbors_hidden"
    config.options.retrieval.store = "runs/knowledge"
    config.options.retrieval.keys = "hidden"
    return config
