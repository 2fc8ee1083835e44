"""Draws images for prompts, with and without retrieval.

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --prompt "two dogs" --workdir demo

Writes into --workdir: one image per prompt and method, and ``grid.png``, which shows the first 64 prompts with one
column per method; its last columns show the stored images with the most credit for the last method's image. All
methods use the same seeds. Each PNG file also holds the prompt, seed, method, model and store as
text.

Images are written batch by batch, and ``run.json`` records the run. If you run the same command again, it continues
where it stopped. A different command replaces the images of the previous run.

Methods that retrieve also write one provenance page per image, ``provenance_NN_METHOD.png``. The page shows which
stored images hold the drawn patches, and how much retrieval changed each draw. ``provenance.json`` holds the same
data as numbers, and a copy audit; for its keys see ``evaluation.provenance.page_and_record``. ``--noprovenance`` turns
both off.

With --image, a part of an image is drawn and the rest is kept:

python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --image photo.png --mask mask.png
python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --image photo.png --extend=right:48
python -m arrag_jax.generate --config configs/emoji_daid.py --prompt "a cat" --image photo.png --strength=0.3 \
    --variations=4
"""

from arrag_jax.command import Flag, main_with_config
from arrag_jax.config import DrawConfig
from arrag_jax.decode.methods import METHODS
from arrag_jax.evaluation.dry_run import PATCHES, dry_run_of_drawing
from arrag_jax.evaluation.generation import AUTO, SIDE, generate
from arrag_jax.evaluation.parts import PartOf
from arrag_jax.topology import TOPOLOGY


def run(
    config: DrawConfig,
    workdir: str,
    prompt: list[str],
    test_prompts: int,
    method: str,
    scale: int | str,
    provenance: bool = True,
    test_group: str = "",
    image: str = "",
    mask: str = "",
    extend: str = "",
    strength: float = 0.0,
    variations: int = 1,
    topology: str = "",
    patches: int = PATCHES.default,
) -> int:
    """Draws every prompt with every method, or only with --method, into --workdir; run it again to continue."""
    if topology:
        return dry_run_of_drawing(config, method, topology, patches, workdir)
    part = PartOf(image, mask, extend, strength) if image or mask or extend or strength else None
    generate(config, workdir, prompt, test_prompts, method, scale, provenance, test_group, part, variations)
    return 0


if __name__ == "__main__":
    main_with_config(
        run,
        DrawConfig,
        "together",
        workdir=Flag("folder for the images; made when absent", "pictures", path=True, storage=True),
        prompt=Flag("what to draw; give it once or several times", ()),
        test_prompts=Flag("draw the first N test prompts of the config's data set as well", 0),
        test_group=Flag("of the test prompts only those of this group, such as unseen or tail; default: all", ""),
        method=Flag(
            f"one or several, with commas, of {', '.join(METHODS)}; default: all that the models can do, side by side",
            "",
        ),
        scale=Flag(f"how many times an image is enlarged; {AUTO}: small ones to about {SIDE} pixels", AUTO),
        provenance=Flag("for methods that retrieve, write where the codes came from and how much is copied", True),
        image=Flag("image of which a part is drawn: needs one of --mask, --extend and --strength", "", path=True),
        mask=Flag("image of the same size as --image: white is drawn, black is kept", "", path=True),
        extend=Flag("draw beyond a side of --image: left, right, up or down, and pixels, such as right:128", ""),
        strength=Flag("draw this share of --image anew, (0, 1]: where the model is least sure of it", 0.0),
        variations=Flag("images per prompt and method, each with the next seed", 1),
        topology=TOPOLOGY,
        patches=PATCHES,
    )
