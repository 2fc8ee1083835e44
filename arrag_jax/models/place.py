"""Finds a model's folder from what a config or a flag names: a folder, a run, an id of the hub, an address."""

import fnmatch
import re
from collections.abc import Collection
from pathlib import Path

from arrag_jax import huggingface, object_storage, remote
from arrag_jax.errors import UserError
from arrag_jax.fields import local_path
from arrag_jax.json_files import read_object

PACKAGE = Path(__file__).resolve().parents[1]
CONFIG = "config.json"
# Where weights are, the preferred form first; an index says in which files its tensors are.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Further files that the layouts of some families need: an adapter, an image tokenizer of its own, a text encoder.
FURTHER = ("adapter_model.safetensors", "adapter_model.bin", "vq*.safetensors", "vq*.pt", "features.npz", "t5/*")
LAYOUTS = (
    "config.json with model.safetensors or pytorch_model.bin, in one file or in several with an index (Janus-Pro, "
    "FAiD, transformers' Janus, exports of this package), or with .pt files (LlamaGen)"
)


def is_run(directory: Path) -> bool:
    """Returns whether a folder is the --workdir of a training run; weight folders may hold ``checkpoints``, too."""
    return (directory / "checkpoints").is_dir() and (directory / "base.json").is_file()


def wherever(directory: Path) -> Path:
    """Returns the folder, or the folder inside this package if the path names one and does not exist.

    So "arrag_jax/assets/emoji_janus" in the shipped configs works from any working directory.
    """
    inside = PACKAGE.parent / directory
    return inside if directory.parts[:1] == (PACKAGE.name,) and not directory.exists() else directory


def checkpoint_folder(directory: Path, also: tuple[str, ...] = ()) -> Path:
    """Returns the folder (see ``wherever``; ``~`` is expanded), or the export in it if it is that of a training run.

    The files that ``load_model`` reads of an id of the hub or of an address are copied into a cache, unless they are
    there.

    Args:
      also: names or patterns of further files to download.

    Raises:
      UserError: if the path is another URL or no folder, the training run has no export yet, or the hub's repository
        cannot be read or has no layout of a model.
    """
    if remote.is_remote(directory):
        return _downloaded(str(directory), also, weights=True)
    directory = wherever(Path(local_path(directory, "checkpoint", huggingface.MODEL)))
    if not directory.is_dir():
        raise UserError(_no_folder(directory))
    if not is_run(directory):
        return directory
    if not (directory / "export" / CONFIG).is_file():
        raise UserError(
            f"{directory} is a training run without an export yet; let it finish, or make one of its best checkpoint: "
            f"python -m arrag_jax.convert --source {directory} --target DIR"
        )
    return directory / "export"


def config_folder(directory: Path) -> Path:
    """Returns what ``checkpoint_folder`` does; of an id of the hub, only JSON files are downloaded, no weights."""
    return (
        _downloaded(str(directory), (), weights=False) if remote.is_remote(directory) else checkpoint_folder(directory)
    )


def _downloaded(text: str, also: tuple[str, ...], weights: bool) -> Path:
    """Returns the folder of the hub's cache with a model's JSON files and, if requested, its weights."""
    found = remote.snapshot(text, "checkpoint", huggingface.MODEL)
    if object_storage.is_address(text) and _is_run_of(found.below()):
        found = remote.snapshot(f"{text}/export", "checkpoint", huggingface.MODEL)
    names = found.below()
    held = [*_indexes(names), *(x for x in WEIGHTS if x in names), *(x for x in names if fnmatch.fnmatch(x, "*.pt"))]
    if CONFIG not in names or not any("/" not in name for name in held):
        lacks = "weights" if CONFIG in names else CONFIG
        raise UserError(f"{found.id} holds no model in a layout that is known: it has no {lacks}; known are: {LAYOUTS}")
    jsons = [name for name in names if name.endswith(".json") and "/" not in name]
    remote.fetch(found, [names[name] for name in jsons])
    if weights:
        needed = _weights(names, found.folder)
        needed |= {name for name in names for pattern in (*FURTHER, *also) if fnmatch.fnmatch(name, pattern)}
        remote.fetch(found, sorted(names[name] for name in needed))
    return found.folder


def run_or_model(place: str) -> Path:
    """Returns the folder of a training run or of a model.

    Of a run at an address, the checkpoints and the records are copied here; the export is not.

    Args:
      place: a path (see ``wherever``), an id of the hub or an address.

    Raises:
      UserError: as in ``checkpoint_folder``, for an id or an address.
    """
    if not remote.is_remote(place):
        return wherever(Path(place))
    if object_storage.is_address(place):
        found = object_storage.snapshot(place, "checkpoint")
        if _is_run_of(found.files):
            object_storage.fetch(found, [x for x in found.files if "/" not in x or x.startswith("checkpoints/")])
            return found.folder
    return checkpoint_folder(Path(place))


def _is_run_of(names: Collection[str]) -> bool:
    """Returns whether these files are those of a training run; see ``is_run``."""
    return "base.json" in names and any(name.startswith("checkpoints/") for name in names)


def _indexes(names: dict[str, str]) -> list[str]:
    return [index for single in WEIGHTS if (index := f"{single}.index.json") in names]


def _weights(names: dict[str, str], folder: Path) -> set[str]:
    """Returns the files that hold a model's weights, in the order of preference of ``tensor_files``."""
    for single in WEIGHTS:
        if f"{single}.index.json" in names:
            listed = read_object(folder / f"{single}.index.json").get("weight_map")
            return {x for x in listed.values() if x in names} if isinstance(listed, dict) else set()
        if single in names:
            return {single}
    return {name for name in names if fnmatch.fnmatch(name, "*.pt") and "/" not in name}


def _no_folder(directory: Path) -> str:
    """Returns the message for a model folder that does not exist."""
    if directory.exists():
        return f"{directory} is a file; give the checkpoint's folder"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)):
        return f"{directory} is no folder here; for the model of that name on the Hugging Face hub write hf:{directory}"
    return f"{directory} is no checkpoint folder: it is not there; give a folder, or hf:OWNER/NAME for one of the hub"
