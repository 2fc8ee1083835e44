"""``manifest.json`` of an exported model: what it reached, where it comes from, and the hashes of its files."""

import dataclasses
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import parse

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
HASHED = ("config.json", "tokenizer.json")  # the sums of the weights stand in their own file


@dataclasses.dataclass(frozen=True)
class ExportManifest:
    """What is read of it, beside what training passes on.

    Attributes:
      tokenizer_fingerprint: by which one of ours is known; None in other people's.
      sha256: of the weights.
      files: name → SHA-256 of the small files; absent in the oldest ones.
    """

    tokenizer_fingerprint: str | None = None
    sha256: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def read_manifest(directory: Path) -> ExportManifest:
    """What a folder's manifest says; nothing where it has none, or somebody else's.

    Raises:
      UserError: it is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return ExportManifest()
    content = read_object(path)
    if "tokenizer_fingerprint" not in content:
        return ExportManifest()
    return parse(ExportManifest, content, str(path), ignore_unknown=True)


def require_written(path: Path) -> None:
    """Raises UserError where a small file of an export is not what its manifest says."""
    expected = read_manifest(path.parent).files.get(path.name)
    if expected is not None and sha256_of(path) != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the manifest's; copy the checkpoint again (if you changed it "
            f"yourself, delete {MANIFEST} beside it)"
        )


def require_weights_written(directory: Path) -> None:
    """Raises UserError where an export's file of weights is not what its manifest says; reads all of it."""
    path, expected = directory / WEIGHTS, read_manifest(directory).sha256
    if expected is not None and path.is_file() and sha256_of(path) != expected:
        raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; copy the checkpoint again")


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes a manifest with the hashes of the folder's files."""
    files = {name: sha256_of(directory / name) for name in HASHED if (directory / name).is_file()}
    write_json(directory / MANIFEST, {**content, "sha256": sha256_of(directory / WEIGHTS), "files": files})
