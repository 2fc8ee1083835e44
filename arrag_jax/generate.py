"""Draws prompts, with retrieval and without.

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --prompt "two dogs" --workdir demo

Leaves in --workdir: a picture a prompt and method, and ``grid.png`` (the first 64 prompts, one column a method, same
seeds). A PNG holds prompt, seed, method, model and store as text. Images are written batch by batch: the same command
goes on where it was (``run.json`` says what is drawn), and another one replaces the pictures of the run before it. For
every method that retrieves also, unless --noprovenance, ``provenance_NN_METHOD.png`` (which stored images hold its
patches, and how far retrieval moved each draw) and ``provenance.json`` (the same in numbers, and a copy audit; its keys
are those of ``evaluation.provenance.page_and_record``).
"""

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.decode.methods import METHODS
from arrag_jax.evaluation.generation import AUTO, SIDE, generate


def run(
    config: DrawConfig,
    workdir: str,
    prompt: list[str],
    test_prompts: int,
    method: str,
    scale: int | str,
    provenance: bool = True,
) -> None:
    """Draws every --prompt with every method (or --method alone), same seeds, into --workdir; run again to continue."""
    generate(config, workdir, prompt, test_prompts, method, scale, provenance)


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        "together",
        workdir=Flag("folder for the pictures; made when absent", "pictures", path=True),
        prompt=Flag("what to draw; give it once or several times", ()),
        test_prompts=Flag("draw the first N test prompts of the config's data set as well", 0),
        method=Flag(f"one of {', '.join(METHODS)}; default: all that the models can do, side by side", ""),
        scale=Flag(f"how many times a picture is enlarged; {AUTO}: small ones to about {SIDE} pixels", AUTO),
        provenance=Flag("of methods that retrieve, write where the codes came from, and how much is copied", True),
    )
