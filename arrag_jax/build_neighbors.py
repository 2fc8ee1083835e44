"""Searches for the neighbours of training and validation images, which FAiD's training reads.

python -m arrag_jax.build_neighbors --config configs/emoji_neighbors.py --workdir runs/neighbors
python -m arrag_jax.build_neighbors --config configs/janus_pro_1b_neighbors.py --config.source=pairs --workdir runs/own

Every source that ``build_datastore`` accepts is valid if its images have captions. The files of a folder are listed
only once, on the first run. If you run it again with the same flags, it continues where it stopped, or says that
nothing is left to do. With --ray the images are encoded and searched on a Ray cluster, see docs/clusters.md.
"""

from pathlib import Path

from arrag_jax.command import RAY, RAY_CORES, Flag, main_with_config
from arrag_jax.config import NeighborsConfig
from arrag_jax.retrieval.neighbor_sets import build
from arrag_jax.work import open_engine


def run(config: NeighborsConfig, workdir: str, ray: str = "", ray_cores: int = RAY_CORES.default) -> None:
    """Writes the neighbours of two splits to --workdir/train and --workdir/valid; run it again to continue."""
    with open_engine(ray, ray_cores) as engine:
        build(config, Path(workdir), engine)


if __name__ == "__main__":
    main_with_config(
        run,
        NeighborsConfig,
        workdir=Flag("folder of both sets; made when absent", path=True, storage=True),
        ray=RAY,
        ray_cores=RAY_CORES,
    )
