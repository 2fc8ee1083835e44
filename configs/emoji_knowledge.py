"""Draws emoji scenes whose pairs training never showed, from a store that holds such pairs.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/ordinary \
    --config.source=emoji_scenes/small --config.num_images=8000 \
    --config.keys=codebook,hidden --config.indexes=codebook,hidden
cp -r runs/ordinary runs/knowledge
python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/knowledge --append \
    --config.source=emoji_scenes/small --config.split=knowledge --config.num_images=2000 \
    --config.keys=codebook,hidden --config.indexes=codebook,hidden
python -m arrag_jax.build_datastore --merge runs/knowledge --excess_above=20 --workdir runs/cut
python -m arrag_jax.eval --config configs/emoji_knowledge.py --num_prompts=240 --num_scenes=400 \
    --workdir runs/knowledge_eval
python -m arrag_jax.generate --config configs/emoji_knowledge.py --method gated+caption --prompt "a red cup" \
    --workdir pictures

λ and copy_share were chosen on test prompts from number 20,000 on, τ and the gates on prompts of the split tuning and
on test scenes that no table uses (docs/LOG.md).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns configs/emoji_daid.py with the methods that search by the backbone's hidden states."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji_daid.py")))["get_config"]()
    config.methods = (
        "plain",
        "static",
        "daid",
        "caption",
        "hidden",
        "hidden+caption",
        "gated",
        "gated+caption",
        "gated+cut",
    )
    config.data.source = "emoji_scenes/small"  # the scenes of "full", fewer of them
    config.best = "gated+caption"
    config.retrieval.store = "runs/knowledge"
    config.untaught_store = "runs/ordinary"
    sharp = {"weight": 0.98, "temperature": 0.001, "reduction": "sum"}
    excess = {"features": ("prompt_excess",), "slopes": (80.0,), "thresholds": (0.1,)}
    surprise = {"features": ("surprise", "prompt_excess"), "slopes": (6.0, 40.0), "thresholds": (0.7, 0.15)}
    config.hidden = {
        "cut_store": "runs/cut",
        "k": 256,
        "copy_share": 0.001,  # a picture never follows a stored image in place
        "daid": sharp,
        "gated": {**sharp, "temperature": 0.03, "gate": surprise},
        "gated_caption": {**sharp, "temperature": 0.003, "gate": excess},
        "cut": {**sharp, "gate": {"features": ("caption",), "slopes": (60.0,), "thresholds": (0.9,)}},
    }
    return config
