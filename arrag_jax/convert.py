"""Converts a checkpoint folder into another layout.

python -m arrag_jax.convert --source checkpoints/Janus-Pro-1B --target checkpoints/janus-pro-1b

Reads Janus-Pro and FAiD as published, ``transformers``' Janus, and our own folders; writes ours, or with --to janus the
published layout. Bytes of tensors stay as they are, unless a LoRA is merged into them.
"""

from pathlib import Path

from arrag_jax.command import Flag, main_with_config
from arrag_jax.models.conversion import TARGETS, convert


def run(source: str, target: str, to: str, merge_lora: bool) -> None:
    """Converts the checkpoint in --source into a new folder --target."""
    done = convert(Path(source), Path(target), to, merge_lora)
    print(f"wrote {target}: {done.tensors} tensors, {done.nbytes:,} bytes")
    if done.dropped:
        print(f"left out, for that layout has no name for them: {len(done.dropped)} tensors, {done.dropped[0]} …")


if __name__ == "__main__":
    main_with_config(
        run,
        None,
        source=Flag("checkpoint folder to read"),
        target=Flag("folder to make; must not be there yet"),
        to=Flag(f"layout to write, one of {', '.join(TARGETS)}", "ours"),
        merge_lora=Flag("add a LoRA adapter to the weights; --nomerge_lora keeps it beside them", True),
    )
