"""Trains a tokenizer, a prior or an adapter: ``python -m arrag_jax.train --config configs/x.py --workdir runs/x``.

If you run it again with the same flags, it continues where it stopped. The last line of its output gives the held-out
metrics of the exported weights, and their folder.

--topology=v5e:4x4 trains nothing: it compiles the step for TPUs that need not be there, prints what a chip needs of
memory and time, and writes it to topology.json in --workdir. The exit code is 1 if the step does not fit.
"""

from pathlib import Path

import jax

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import TrainConfig
from arrag_jax.topology import TOPOLOGY, dry_run, open_topology
from arrag_jax.training.dry_run import training_program
from arrag_jax.training.export import summary
from arrag_jax.training.loop import train
from arrag_jax.training.program import Profile
from arrag_jax.training.tasks import TASKS, make_task


def run(config: TrainConfig, workdir: str, topology: str = "", profile: str = "") -> int:
    """Runs the training of the config in --workdir; run it again to continue."""
    if topology:
        described = open_topology(topology)
        return dry_run(described, [training_program(config, described)], Path(workdir))
    train(config, make_task(config), Path(workdir), Profile.parse(profile))
    if jax.process_index() == 0:
        print(summary(Path(workdir)))
    return 0


if __name__ == "__main__":
    main_with_config(
        run,
        TrainConfig,
        "together",
        sections={"options": ("task", {task: options for task, (_, options) in TASKS.items()})},
        workdir=Flag("folder of the run; made when absent", path=True, storage=True),
        topology=TOPOLOGY,
        profile=Flag("write a profile of these steps, START:STOP, for TensorBoard and Perfetto, into --workdir", ""),
    )
