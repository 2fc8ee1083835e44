"""Trains a tokenizer, a prior or an adapter: ``python -m arrag_jax.train --config configs/x.py --workdir runs/x``.

If you run it again with the same flags, it continues where it stopped. The last line of its output gives the held-out
metrics of the exported weights, and their folder.
"""

from pathlib import Path

import jax

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import TrainConfig
from arrag_jax.training.export import summary
from arrag_jax.training.loop import train
from arrag_jax.training.tasks import TASKS, make_task


def run(config: TrainConfig, workdir: str) -> None:
    """Runs the training of the config in --workdir; run it again to continue."""
    train(config, make_task(config), Path(workdir))
    if jax.process_index() == 0:
        print(summary(Path(workdir)))


if __name__ == "__main__":
    main_with_config(
        run,
        TrainConfig,
        "together",
        sections={"options": ("task", {task: options for task, (_, options) in TASKS.items()})},
        workdir=Flag("folder of the run; made when absent", path=True),
    )
