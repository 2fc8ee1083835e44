"""Looks up the neighbours of training and validation images, which FAiD is trained on.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
python -m arrag_jax.build_neighbors --config configs/janus_pro_1b_neighbors.py --config.source=pairs --workdir runs/own

Images come from whatever ``build_datastore`` takes, with captions; a folder is listed once, when the sets are begun.
Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do.
"""

from pathlib import Path

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import NeighborsConfig
from arrag_jax.retrieval.neighbor_sets import build


def run(config: NeighborsConfig, workdir: str) -> None:
    """Looks up the neighbours of two splits, in --workdir/train and --workdir/valid; run again to continue."""
    build(config, Path(workdir))


if __name__ == "__main__":
    main_with_config(run, NeighborsConfig, workdir=Flag("folder of both sets; made when absent", path=True))
