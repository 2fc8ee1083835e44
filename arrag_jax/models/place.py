"""Finds a model's folder from what a config or a flag names: a folder, a training run, or an id of the hub."""

import fnmatch
import re
from pathlib import Path

from arrag_jax import huggingface
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

    The files that ``load_model`` reads of an id of the hub are downloaded into the hub's cache, unless they are there.

    Args:
      also: names or patterns of further files to download.

    Raises:
      UserError: if the path is another URL or no folder, the training run has no export yet, or the hub's repository
        cannot be read or has no layout of a model.
    """
    if huggingface.is_id(directory):
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
        _downloaded(str(directory), (), weights=False) if huggingface.is_id(directory) else checkpoint_folder(directory)
    )


def _downloaded(text: str, also: tuple[str, ...], weights: bool) -> Path:
    """Returns the folder of the hub's cache with a model's JSON files and, if requested, its weights."""
    found = huggingface.snapshot(huggingface.parse_id(text, "checkpoint", huggingface.MODEL))
    names = found.below()
    held = [*_indexes(names), *(x for x in WEIGHTS if x in names), *(x for x in names if fnmatch.fnmatch(x, "*.pt"))]
    if CONFIG not in names or not any("/" not in name for name in held):
        lacks = "weights" if CONFIG in names else CONFIG
        raise UserError(f"{found.id} holds no model in a layout that is known: it has no {lacks}; known are: {LAYOUTS}")
    jsons = [name for name in names if name.endswith(".json") and "/" not in name]
    huggingface.fetch(found, [names[name] for name in jsons])
    if weights:
        needed = _weights(names, found.folder)
        needed |= {name for name in names for pattern in (*FURTHER, *also) if fnmatch.fnmatch(name, pattern)}
        huggingface.fetch(found, sorted(names[name] for name in needed))
    return found.folder


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
