"""Opens models of other people's libraries for benchmarks: folders that ``transformers`` reads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of


class Pretrained(NamedTuple):
    """A model of ``transformers``, what prepares its inputs, and the module ``torch``."""

    torch: Any
    prepare: Any
    model: Any


def pretrained(folder: Path, processor: str, model: str, flag: str, noun: str) -> Pretrained:
    """Returns the model in a folder; nothing is downloaded, and only safetensors are read.

    Args:
      processor, model: names of classes of ``transformers``.
      flag: the flag that asks for the model, for messages.
      noun: what the folder should hold, for messages.

    Raises:
      UserError: if torch or transformers is missing, or the folder holds no such model.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError(f"{flag} needs torch and transformers; pip install 'arrag_jax[eval]'") from None
    where = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    try:
        prepare = getattr(transformers, processor).from_pretrained(**where)
        found = getattr(transformers, model).from_pretrained(**where, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no {noun} that transformers reads ({reason})") from None
    return Pretrained(torch, prepare, found)


def folder_hashes(folder: Path, suffixes: Collection[str] = (".json", ".safetensors")) -> dict[str, str]:
    """Returns the SHA-256 of the settings and weights in a model's folder, by file."""
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    return {path.name: sha256_of(path) for path in files}
