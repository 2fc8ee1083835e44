"""The output folder of ``generate``. It can be continued after an interruption, and it holds the files of one run only.

``run.json`` holds the settings of the run and, once the run is complete, the SHA-256 of every file. Until then,
``.parts`` holds one record per image, which is written after the image itself. A run that was interrupted at any moment
can therefore find out which images are complete. A run with other settings removes the files of the previous run.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.run_record import RunRecord, method_facts
from arrag_jax.figures.canvas import RGBImage
from arrag_jax.figures.grids import save
from arrag_jax.files import atomic_write, folder_in, require_within, sha256_of, write_json
from arrag_jax.json_files import read_json

PARTS = ".parts"
GRID, PROVENANCE = "grid.png", "provenance.json"
MADE_BY = "arrag_jax.generate"
NAME = re.compile(r"\d{2,}_[a-z+]+")  # name of an image; other files are never removed


def settings_of(pipeline: Pipeline, prompts: Sequence[str], scale: int, provenance: bool) -> dict[str, Any]:
    """Returns all settings that the files of a run depend on. The batch size is not one of them."""
    config = pipeline.config
    return {
        "prompts": list(prompts),
        "seed": config.seed,
        "methods": {method: method_facts(pipeline, method) for method in pipeline.methods},
        "dtype": config.dtype,
        "sampling": dataclasses.asdict(config.sampling),
        "mesh": {} if pipeline.mesh is None else dict(pipeline.mesh.shape),
        "scale": scale,
        "provenance": provenance,
    }


class RunFolder:
    """A folder of images named NN_METHOD; only one process writes to it.

    Attributes:
      directory: the folder.
      settings: settings of this run.
      names: names of its images, in the order of ``provenance.json``.
      complete: whether all files existed when this run began.
      earlier: names of the settings in which a previous run in this folder differs; () = there was none.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], names: Sequence[str]):
        self.directory, self.names = directory, list(names)
        self._record = RunRecord(directory, MADE_BY, settings)
        self.settings = self._record.settings
        self.earlier: tuple[str, ...] = ()
        self.complete = False
        self._parts = directory / PARTS

    def begin(self) -> set[str]:
        """Returns the names of the images that are already complete; removes the files of a run with other settings.

        Raises:
          UserError: if ``run.json`` is damaged or was not written by ``generate``, or if ``.parts`` is a link that
            leads out of the folder.
        """
        require_within(self.directory, self._parts)
        record = self._read_record()
        if record is not None and record["settings"] == self.settings:
            files = record.get("files")
            if files is not None and self._are_whole(files):
                self.complete = True
                return set(self.names)
            if files is not None:  # a file of a complete run was changed or removed
                self._reopen(files)
        else:
            if record is not None:
                self.earlier = self._record.differing(record)
                self._remove(record["pictures"])
            shutil.rmtree(self._parts, ignore_errors=True)
            self._write_record()
        folder_in(self.directory, PARTS)
        parts = {name: self._part(name)["files"] for name in self.names}
        return {name for name, files in parts.items() if files and self._are_whole(files)}

    def add(
        self,
        name: str,
        picture: RGBImage,
        texts: Mapping[str, str],
        page: RGBImage | None,
        record: dict[str, Any] | None,
    ) -> None:
        """Writes an image with its text chunks and, if given, its provenance page; then writes its record."""
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        files = {f"{name}.png": picture} | ({} if page is None else {f"provenance_{name}.png": page})
        for file, pixels in files.items():
            save(self.directory / file, pixels, info)
        hashes = {file: sha256_of(self.directory / file) for file in files}
        write_json(self._parts / f"{name}.json", {"files": hashes, "record": record})

    def picture(self, name: str) -> RGBImage:
        """Returns an image that was written, at its original size before enlargement."""
        scale = self.settings["scale"]
        with Image.open(self.directory / f"{name}.png") as image:
            return np.asarray(image)[::scale, ::scale]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields the provenance records of the images, in the order of the images."""
        for name in self.names:
            record = self._part(name)["record"]
            if record is not None:
                yield record

    def finish(self, grid: RGBImage) -> None:
        """Writes the grid and the provenance records, and marks the run as complete."""
        save(self.directory / GRID, grid)
        files, count = {GRID: sha256_of(self.directory / GRID)}, 0
        with atomic_write(self.directory / PROVENANCE) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for count, record in enumerate(self.records(), 1):
                text = json.dumps(record, indent=1, ensure_ascii=False).replace("\n", "\n ")
                file.write(f"{'[' if count == 1 else ','}\n {text}")
            file.write("\n]\n")
        if count:
            files[PROVENANCE] = sha256_of(self.directory / PROVENANCE)
        else:
            (self.directory / PROVENANCE).unlink()
        for name in self.names:
            files |= self._part(name)["files"]
        self._write_record(files)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _part(self, name: str) -> dict[str, Any]:
        """Returns the record of an image; its dict of files is empty if the image is not complete."""
        try:
            part = read_json(self._parts / f"{name}.json")
        except UserError:
            part = None
        if isinstance(part, dict) and isinstance(part.get("files"), dict) and "record" in part:
            return part
        return {"files": {}, "record": None}

    def _are_whole(self, files: Mapping[str, str]) -> bool:
        paths = {self.directory / file: digest for file, digest in files.items()}
        return all(path.is_file() and sha256_of(path) == digest for path, digest in paths.items())

    def _reopen(self, files: dict[str, str]) -> None:
        """Turns a complete run into an incomplete one.

        Writes a record for each image whose provenance record is still known, or that has none.
        """
        folder_in(self.directory, PARTS)
        told, known = [name for name in self.names if f"provenance_{name}.png" in files], {}
        if told and self._are_whole({PROVENANCE: files.get(PROVENANCE, "")}):
            known = dict(zip(told, read_json(self.directory / PROVENANCE), strict=True))
        for name in [name for name in self.names if name in known or name not in told]:
            own = {file: files[file] for file in (f"{name}.png", f"provenance_{name}.png") if file in files}
            write_json(self._parts / f"{name}.json", {"files": own, "record": known.get(name)})
        self._write_record()

    def _remove(self, pictures: Sequence[str]) -> None:
        names = [name for name in pictures if NAME.fullmatch(name)]
        for file in (GRID, PROVENANCE, *(f"{kind}{name}.png" for name in names for kind in ("", "provenance_"))):
            (self.directory / file).unlink(missing_ok=True)

    def _write_record(self, files: dict[str, str] | None = None) -> None:
        self._record.write(pictures=self.names, **({} if files is None else {"files": dict(sorted(files.items()))}))

    def _read_record(self) -> dict[str, Any] | None:
        record = self._record.read()
        if record is not None and not _names_files(record):
            raise UserError(f"{self._record.path} is not whole; delete it to draw anew, or choose another --workdir")
        return record


def _names_files(record: Mapping[str, Any]) -> bool:
    def all_text(values: Any) -> bool:
        return all(isinstance(value, str) for value in values)

    return (
        isinstance(record.get("pictures"), list)
        and all_text(record["pictures"])
        and isinstance(record.get("files", {}), dict)
        and all_text(record.get("files", {}).values())
    )
