"""Builds a small datastore and draws images with it, with and without retrieval.

python -m arrag_jax.demo
python -m arrag_jax.demo --workdir=/tmp/demo

Writes into --workdir: the images and their overview ``grid.png`` in ``pictures``, the datastore in ``store``, and the
scenes that it is built from in ``data``. Half of these scenes show what training never showed, and the prompts ask for
it. The demo needs no files except this package. If you run it again, it continues
where it stopped.
"""

import runpy
import sys
from collections.abc import Sequence

from arrag_jax import console, progress, signals
from arrag_jax.command import Flag, main_with_config

STORE = (
    "--config=configs/emoji_datastore.py",
    "--workdir={}/store",
    "--config.source=emoji_scenes/small",
    "--config.data_dir={}/data",
    "--config.keys=codebook,hidden",
    "--config.indexes=",
)
WORKDIR = "demo"
# Module and arguments of each command to run; "{}" stands for --workdir.
STORE_COMMANDS = (
    ("build_datastore", *STORE, "--config.num_images=2000"),
    ("build_datastore", *STORE, "--append", "--config.split=knowledge", "--config.num_images=2000"),
)
COMMANDS = (
    *STORE_COMMANDS,
    (
        "generate",
        "--config=configs/emoji_knowledge.py",
        "--workdir={}/pictures",
        "--config.retrieval.store={}/store",
        "--method=plain,gated+caption",
        "--test_prompts=8",
        "--test_group=unseen",
    ),
)


def run(workdir: str) -> None:
    """Builds a datastore in --workdir, and draws 8 prompts without and with it.

    Half of the datastore's 4,000 scenes show pairs that training never showed, and so do the prompts.
    """
    _run_all(COMMANDS, workdir)


def build_store(workdir: str) -> None:
    """Builds the demo's datastore in ``workdir``/store."""
    _run_all(STORE_COMMANDS, workdir)


def _run_all(commands: Sequence[tuple[str, ...]], workdir: str) -> None:
    own = ["--noprogress"] * (not progress.wanted()) + ["--verbose"] * (not console.is_quiet())
    for module, *words in commands:
        _run(module, [*(word.replace("{}", workdir) for word in words), *own])


def _run(module: str, arguments: list[str]) -> None:
    """Runs a command of the package in this process; raises SystemExit if it fails."""
    sys.argv = [f"arrag_jax.{module}", *arguments]
    try:
        runpy.run_module(f"arrag_jax.{module}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    signals.begin()  # the inner command has recorded its end, but the demo continues


if __name__ == "__main__":
    main_with_config(run, None, workdir=Flag("folder of the demo; made when absent", WORKDIR, path=True))
