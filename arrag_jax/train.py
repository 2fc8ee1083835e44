"""Trains a tokenizer, a prior or an adapter: ``python -m arrag_jax.train --config configs/x.py --workdir runs/x``.

Run again with the same flags, it goes on where it stopped. Its last line tells the held-out figures of the weights
that it exported, and their folder.
"""

from pathlib import Path

import jax

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import TrainConfig
from arrag_jax.training.export import summary
from arrag_jax.training.loop import train
from arrag_jax.training.tasks import TASKS, make_task


def run(config: TrainConfig, workdir: str) -> None:
    """Trains what the config says, in --workdir; run again to continue."""
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
