"""A checkpoint folder from one layout into another, tensor by tensor, bytes as they are.

What drawing never needs (text head, training counter, image-understanding tower) is kept, for the way back: in our
folders in ``unused.safetensors``, which is never read otherwise and may be deleted.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.files import atomic_folder, free_bytes, require_new, sync, write_json
from arrag_jax.models.config_json import read_json, read_lora
from arrag_jax.models.family import Family
from arrag_jax.models.layouts import Layout
from arrag_jax.models.registry import TARGETS, family_in
from arrag_jax.models.tensor_files import (
    ADAPTER,
    Stored,
    checkpoint_folder,
    read_tensors,
    some,
    write_tensors,
)
from arrag_jax.models.weights import match, require_finite

UNUSED = "unused.safetensors"
SHARD_BYTES = 2**30  # as much as this is in memory at once
# Beside config.json, what a prompt needs; the rest of a folder is documentation.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
      tensors: how many. nbytes: of them all.
      dropped: keys that the target's layout has no name for.
    """

    tensors: int
    nbytes: int
    dropped: tuple[str, ...]


def convert(source: Path, target: Path, to: str, merge_lora: bool = True) -> Conversion:
    """Writes the checkpoint in ``source`` to a new folder.

    Args:
      to: "ours", or the name of a published layout of the source's family; written as safetensors.
      merge_lora: add a LoRA to the weights that it corrects; else it stays a PEFT adapter beside them.

    Raises:
      UserError: the source is not a whole model, its family has no such layout, the target is in use, or the disk is
        too small.
    """
    if to not in TARGETS:
        raise UserError(f"--to={to!r} is unknown; choose one of {', '.join(TARGETS)}")
    require_new(target, "--target=")  # before any work; once more when the folder is held
    source = checkpoint_folder(source)
    family = family_in(source)
    if to not in family.layouts:
        raise UserError(f"--to={to!r} is no layout of the model in {source}; choose one of {', '.join(family.layouts)}")
    model, layout, stored = family.open(source, (UNUSED, *family.files))
    _require_no_other(model, stored, layout, source)
    matched, written = match(model, stored, layout, source), family.layouts[to]
    weights = {written.key(path): tensor for path, tensor in matched.items() if "_lora." not in path}
    lora = {written.key(path): tensor for path, tensor in matched.items() if "_lora." in path}
    unused, dropped = _unused(stored, layout, written)
    files = _shards(weights if to == "ours" else weights | unused)
    if to == "ours" and unused:
        files[UNUSED] = unused
    if lora and not merge_lora:
        files[f"{ADAPTER}.safetensors"] = {f"base_model.model.{key}": tensor for key, tensor in lora.items()}
    with _new_folder(target, sum(tensor.nbytes for file in files.values() for tensor in file.values())) as folder:
        _write_tensors(folder, files, weights, _Merge(lora, source) if merge_lora else None)
        _write_companions(folder, source, model, family, written, apart=bool(lora) and not merge_lora)
    tensors = [tensor for file in files.values() for tensor in file.values()]
    return Conversion(len(tensors), sum(tensor.nbytes for tensor in tensors), tuple(dropped))


def _require_no_other(model: nnx.Module, stored: dict[str, Stored], layout: Layout, source: Path) -> None:
    """Raises UserError where a folder whose config is a tokenizer's alone holds tensors of more than that."""
    absent = tuple(prefix for part, prefix in layout.parts.items() if getattr(model, part) is None)
    other = sorted(key for key in stored if absent and key.startswith(absent))
    if other:
        raise UserError(
            f"{source / 'config.json'} describes an image tokenizer alone, but its weights hold {some(other)}; "
            "copy the checkpoint again"
        )


def _unused(stored: dict[str, Stored], layout: Layout, written: Layout) -> tuple[dict[str, Stored], list[str]]:
    """What drawing never needs: by the key of the layout to be written, and the keys that have none there."""
    keys = {key for key in stored if layout.unused.fullmatch(key)}
    named = {key: key for key in keys} if layout is written else {x: layout.from_published(x) for x in layout.shared}
    kept = {name: stored[key] for name, key in named.items() if key in keys}
    return kept, sorted(keys - set(named.values()))


def _shards(tensors: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    """File names and what goes into them, in the order of keys; one file where it is small enough."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for key, tensor in sorted(tensors.items()):
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class _Merge:
    """Adds LoRA's correction, in float32, to the weights that have one: W + (α/r) B A."""

    def __init__(self, lora: dict[str, Stored], source: Path):
        self.lora = lora
        config = read_lora(source)
        self.scale = config.alpha / config.rank if config else 0.0

    def __call__(self, key: str, value: np.ndarray) -> np.ndarray:
        sides = [key.removesuffix("weight") + f"lora_{side}.weight" for side in "AB"]
        if sides[0] not in self.lora:
            return value
        a, b = (tensor.astype(np.float32) for _, tensor in read_tensors({side: self.lora[side] for side in sides}))
        return (value.astype(np.float32) + self.scale * (b @ a)).astype(value.dtype)


def _write_tensors(
    folder: Path, files: dict[str, dict[str, Stored]], weights: dict[str, Stored], merge: _Merge | None
) -> None:
    """Writes the files one after another, and an index where the model has several; shows a bar over the bytes."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    with progress.bar(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        for name, tensors in files.items():
            arrays = {}
            for key, value in read_tensors(tensors):
                if key in weights:
                    require_finite(value, tensors[key])
                arrays[key] = merge(key, value) if merge else value
                bar.update(value.nbytes)
            write_tensors(arrays, folder / name)
            sync(folder / name)
    shards = {name: tensors for name, tensors in files.items() if name.startswith("model-")}
    if shards:
        size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        places = {key: name for name, tensors in shards.items() for key in tensors}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _write_companions(folder: Path, source: Path, model: Any, family: Family, written: Layout, apart: bool) -> None:
    """The config, with whatever else a published source says in its own; the tokenizer; the LoRA's config."""
    given = read_json(source)
    kept = given if family.layout_of(given) is written else {}
    write_json(folder / "config.json", _overlaid(kept, family.to_json(model.config)))
    for name in (*COMPANIONS, *(["adapter_config.json"] if apart else [])):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _overlaid(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both objects' keys, section by section; ``over`` wins."""
    both = {key: _overlaid(under[key], over[key]) for key in under.keys() & over.keys() if isinstance(over[key], dict)}
    return {**under, **over, **both}


@contextmanager
def _new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """``files.atomic_folder`` of a new folder, once the disk is known to have room for so many bytes."""
    free = free_bytes(Path(os.path.realpath(target)))
    if free < nbytes:
        raise UserError(
            f"{target} needs {nbytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} left; free some space"
        )
    with atomic_folder(target, "a checkpoint") as folder:
        yield folder
