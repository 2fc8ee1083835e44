"""Converts a checkpoint folder into another layout, or a training run's checkpoint into a folder.

python -m arrag_jax.convert --source checkpoints/published --target checkpoints/janus-pro-1b
python -m arrag_jax.convert --source runs/faid --target checkpoints/faid_best

Reads the published layouts, the layouts that ``transformers`` saves, this package's own folders, and the --workdir of
arrag_jax.train. From a workdir it reads the best checkpoint, or with --last the newest one. Writes this package's own
layout, or the published layout that --to names, such as janus. The bytes of tensors do not change, unless a LoRA is
merged into them. A training run is written in the same form as its own export.
"""

from pathlib import Path

from arrag_jax import huggingface, object_storage, signals
from arrag_jax.command import Flag, main_with_config
from arrag_jax.errors import UserError
from arrag_jax.files import require_new
from arrag_jax.models.conversion import convert
from arrag_jax.models.place import is_run, run_or_model
from arrag_jax.models.registry import TARGETS


def run(source: str, target: str, to: str, merge_lora: bool, last: bool) -> None:
    """Converts the checkpoint in --source into a new folder --target."""
    signals.begins_anew()
    folder = run_or_model(source) if object_storage.is_address(source) else Path(source)
    if is_run(folder):
        _export(str(folder), target, to, merge_lora, last)
        return
    if last:
        raise UserError(f"--last is for the workdir of a training run, which --source={source} is not")
    done = convert(Path(source), Path(target), to, merge_lora)
    print(f"wrote {target}: {done.tensors} tensors, {done.nbytes:,} bytes")
    if done.dropped:
        print(
            f"left out {len(done.dropped)} tensors ({done.dropped[0]} …), because the target's layout cannot name them"
        )


def _export(source: str, target: str, to: str, merge_lora: bool, last: bool) -> None:
    from arrag_jax.training.export import export_run  # imported here, because the import takes as long as a conversion

    if to != "ours" or not merge_lora:
        raise UserError(f"--source={source} is a training run: export it without --to and --nomerge_lora first")
    require_new(Path(target), "--target=")
    step = export_run(Path(source), Path(target), last)
    print(f"wrote {target}: step {step} of {source}")


if __name__ == "__main__":
    main_with_config(
        run,
        None,
        source=Flag(
            "checkpoint folder to read, workdir of a training run, or hf:OWNER/NAME of the hub",
            path=True,
            hub=huggingface.MODEL,
        ),
        target=Flag("folder to make; must not be there yet", path=True, storage=True),
        to=Flag(f"layout to write, one of {', '.join(TARGETS)}", "ours"),
        merge_lora=Flag("add a LoRA adapter to the weights; --nomerge_lora keeps it beside them", True),
        last=Flag("of a training run: its newest checkpoint, not its best", False),
    )
