"""Draws long-tailed emoji scenes from a store that shows the classes that are rare or absent in training.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/long_tail_store \
    --config.model=runs/long_tail_prior/export --config.source=emoji_scenes/long_tail --config.split=knowledge \
    --config.num_images=12000 --config.keys=codebook,hidden --config.indexes=codebook,hidden
python -m arrag_jax.eval --config configs/long_tail_knowledge.py --num_prompts=240 --num_scenes=240 \
    --workdir runs/long_tail_eval

The model is trained by configs/long_tail_tokenizer.py and configs/long_tail_prior.py. λ, τ and the gate are those of
configs/emoji_knowledge.py, the gate that of ``gated``; none was chosen on these scenes.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_knowledge.py with the long-tailed model, data and store."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_knowledge.py")))["get_config"]()
    config.model = "runs/long_tail_prior/export"
    config.data.source = "emoji_scenes/long_tail"
    config.retrieval.store = "runs/long_tail_store"
    config.untaught_store = ""
    config.hidden.cut_store = ""
    config.hidden.gated_caption.gate = config.hidden.gated.gate
    config.methods = ("plain", "daid", "hidden", "hidden+caption", "gated", "gated+caption")
    return config
