"""Defines the console command ``arrag``, which runs every command of the package.

``arrag COMMAND ARGUMENTS`` does the same as ``python -m arrag_jax.MODULE ARGUMENTS``; ``COMMANDS`` lists the modules.
"""

import runpy
import sys
from typing import NamedTuple

import arrag_jax
from arrag_jax import console, errors


class Command(NamedTuple):
    """A command of ``arrag``: its module, and a description for the help."""

    module: str
    about: str


COMMANDS = {
    "demo": Command("demo", "builds a small datastore and draws with it, plain and with retrieval"),
    "train": Command("train", "trains a tokenizer, a prior or an adapter"),
    "generate": Command("generate", "draws prompts, with retrieval and without"),
    "studio": Command("studio", "shows a page that draws, and where each patch of a picture comes from"),
    "serve": Command("serve", "answers requests for images over HTTP, in the form of OpenAI's images API"),
    "eval": Command("eval", "measures checkpoints with and without retrieval"),
    "store": Command("build_datastore", "builds a datastore from images; adds to one, merges, verifies, measures"),
    "neighbors": Command("build_neighbors", "looks up the neighbours of images ahead, for FAiD's training"),
    "provenance": Command("provenance", "prints where a drawn image comes from, as its PNG file tells"),
    "convert": Command("convert", "converts a checkpoint folder into another layout"),
}
USAGE = """\
arrag COMMAND ARGUMENTS: retrieval inside autoregressive image generation

commands:
{}

arrag COMMAND --help tells a command's arguments, arrag --version the version.
"""


def main() -> None:
    """Runs the command that the first argument names; the entry point of the console script."""
    errors.start_command()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "--version"):
        lines = "\n".join(f"  {name:10} {command.about}" for name, command in COMMANDS.items())
        with console.written_out():
            print(f"arrag {arrag_jax.__version__}" if name == "--version" else USAGE.format(lines).rstrip())
        return
    if name not in COMMANDS:
        errors.leave(errors.UserError(f"unknown command {name!r}; known are {', '.join(COMMANDS)}").line, 2)
    module = f"arrag_jax.{COMMANDS[name].module}"
    errors.call_commands({command.module: f"arrag {name}" for name, command in COMMANDS.items()})
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]  # a training run records this as its command
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
