"""``manifest.json`` of an exported model: its evaluation results, its origin, and the hashes of its files."""

import dataclasses
from pathlib import Path
from typing import Any

from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of, write_json
from arrag_jax.json_files import read_object
from arrag_jax.parsing import parse

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
HASHED = ("config.json", "tokenizer.json")  # the weights' own file holds checksums of the tensors


@dataclasses.dataclass(frozen=True)
class ExportManifest:
    """The fields of a manifest that identify and verify an export. A manifest also records how the model was trained.

    Attributes:
      tokenizer_fingerprint: every manifest that this package writes has one; None = the manifest is not ours.
      sha256: hash of the file of weights.
      files: name → SHA-256 of the small files; early manifests have none.
    """

    tokenizer_fingerprint: str | None = None
    sha256: str | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def read_manifest(directory: Path) -> ExportManifest:
    """Returns a folder's manifest; an empty one if the folder has none, or one that this package did not write.

    Raises:
      UserError: if the manifest is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return ExportManifest()
    content = read_object(path)
    if "tokenizer_fingerprint" not in content:
        return ExportManifest()
    return parse(ExportManifest, content, str(path), ignore_unknown=True)


def require_written(path: Path) -> None:
    """Raises UserError if a small file of an export does not match the hash in its manifest."""
    expected = read_manifest(path.parent).files.get(path.name)
    if expected is not None and sha256_of(path) != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the manifest's; copy the checkpoint again (if you changed it "
            f"yourself, delete {MANIFEST} beside it)"
        )


def require_weights_written(directory: Path) -> None:
    """Raises UserError if an export's file of weights does not match the hash in its manifest; reads the whole file."""
    path, expected = directory / WEIGHTS, read_manifest(directory).sha256
    if expected is not None and path.is_file() and sha256_of(path) != expected:
        raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's; copy the checkpoint again")


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Writes a folder's manifest: ``content`` and the hashes of the folder's files."""
    files = {name: sha256_of(directory / name) for name in HASHED if (directory / name).is_file()}
    write_json(directory / MANIFEST, {**content, "sha256": sha256_of(directory / WEIGHTS), "files": files})
