"""Converts a checkpoint folder to another layout, tensor by tensor; only a merged LoRA changes the bytes of a tensor.

Tensors that generation never needs (text head, training counter, image-understanding tower) are kept, so that a folder
can be converted back. Our folders keep them in ``unused.safetensors``. Only a conversion reads this file; it may be
deleted.
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
from arrag_jax.models.place import checkpoint_folder
from arrag_jax.models.registry import TARGETS, family_in
from arrag_jax.models.tensor_files import (
    ADAPTER,
    Stored,
    read_tensors,
    some,
    write_tensors,
)
from arrag_jax.models.weights import match, require_finite

UNUSED = "unused.safetensors"
SHARD_BYTES = 2**30  # one shard is in memory at a time
# The files besides config.json that prompts need. Other files of a source folder are documentation and are not copied.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      tensors: number of tensors written.
      nbytes: their total size in bytes.
      dropped: keys that are not written, because the target's layout has no name for them.
    """

    tensors: int
    nbytes: int
    dropped: tuple[str, ...]


def convert(source: Path, target: Path, to: str, merge_lora: bool = True) -> Conversion:
    """Writes the checkpoint in ``source`` to a new folder.

    Args:
      source: checkpoint folder.
      target: folder to create.
      to: "ours", or the name of a published layout of the source's family; the files are safetensors.
      merge_lora: adds a LoRA to the weights that it corrects; otherwise it stays a PEFT adapter in a separate file.

    Raises:
      UserError: if the source is not a complete model, its family has no such layout, the target is in use, or the
        disk is too small.
    """
    if to not in TARGETS:
        raise UserError(f"--to={to!r} is unknown; choose one of {', '.join(TARGETS)}")
    require_new(target, "--target=")  # fails before long work starts; ``atomic_folder`` checks again under its lock
    family = family_in(source)  # of an id of the hub, before its weights are downloaded
    source = checkpoint_folder(source, (UNUSED,))
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
    """Raises UserError if the config describes an image tokenizer alone, but the weights hold other parts."""
    absent = tuple(prefix for part, prefix in layout.parts.items() if getattr(model, part) is None)
    other = sorted(key for key in stored if absent and key.startswith(absent))
    if other:
        raise UserError(
            f"{source / 'config.json'} describes an image tokenizer alone, but its weights hold {some(other)}; "
            "copy the checkpoint again"
        )


def _unused(stored: dict[str, Stored], layout: Layout, written: Layout) -> tuple[dict[str, Stored], list[str]]:
    """Returns the unused tensors by their keys in the layout to be written, and the keys that have no name there."""
    keys = {key for key in stored if layout.unused.fullmatch(key)}
    named = {key: key for key in keys} if layout is written else {x: layout.from_published(x) for x in layout.shared}
    kept = {name: stored[key] for name, key in named.items() if key in keys}
    return kept, sorted(keys - set(named.values()))


def _shards(tensors: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Returns file name → tensors in the order of their keys; a single file if the tensors fit into one shard."""
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
    """Adds the LoRA correction to the weights that have one: W + (α/r) B A, computed in float32."""

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
    """Writes the files one after another, and an index if the model has several; shows a progress bar over bytes."""
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
    """Writes the config, the tokenizer and, if ``apart``, the config of the LoRA.

    If the source has the target's layout, further keys of its config are kept.
    """
    given = read_json(source)
    kept = given if family.layout_of(given) is written else {}
    write_json(folder / "config.json", _overlaid(kept, family.to_json(model.config)))
    for name in (*COMPANIONS, *(["adapter_config.json"] if apart else [])):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _overlaid(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of both objects, merged section by section; ``over`` has precedence."""
    both = {key: _overlaid(under[key], over[key]) for key in under.keys() & over.keys() if isinstance(over[key], dict)}
    return {**under, **over, **both}


@contextmanager
def _new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Opens ``files.atomic_folder`` for a new folder after checking that the disk has room for ``nbytes``."""
    free = free_bytes(Path(os.path.realpath(target)))
    if free < nbytes:
        raise UserError(
            f"{target} needs {nbytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} left; free some space"
        )
    with atomic_folder(target, "a checkpoint") as folder:
        yield folder
