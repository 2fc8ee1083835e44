"""The studio's stores: which one is open, what it holds, and new ones built from a visitor's pictures."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from arrag_jax.config import DatastoreConfig, DrawConfig
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.retrieval import build
from arrag_jax.store.forgetting import forget
from arrag_jax.store.hidden import backbones_in
from arrag_jax.store.images import names_left_out
from arrag_jax.store.shards import MANIFEST

REASONS = 20  # skipped files that are listed


class Shelf:
    """The open store and its pipeline.

    Attributes:
      config: the settings that the pipeline was opened with.
      pipeline: replaced as a whole when another store is opened; drawings that run keep theirs.
    """

    def __init__(self, config: DrawConfig, methods: Sequence[str], folder: Path):
        """Opens the config's store; new stores are built in ``folder``."""
        self.config, self.methods, self.folder = config, tuple(methods), folder
        self.pipeline: Pipeline = open_pipeline(config, methods)
        self._lock = threading.Lock()

    def open(self, store: str) -> str:
        """Opens another store; returns what it holds.

        Raises:
          UserError: if there is none, or if it does not fit the model; the store that was open stays so.
        """
        if not (Path(store) / MANIFEST).is_file():
            raise UserError(f"{store or 'the empty path'} holds no finished datastore; build one from pictures")
        retrieval = dataclasses.replace(self.config.retrieval, store=store)
        with self._lock:
            self.pipeline = open_pipeline(dataclasses.replace(self.config, retrieval=retrieval), self.methods)
        return self.report()

    def report(self) -> str:
        """Returns in Markdown what the open store holds."""
        store = self.pipeline.datastore
        keys = (*store.settings.keys, *((HIDDEN.name,) if backbones_in(store.directory) else ()))
        lines = [
            f"**{store.directory}**: {store.num_images:,} images, {store.num_patches:,} patches, "
            f"keys: {', '.join(keys)}, from `{store.settings.source}`"
        ]
        lines += [f"- forgotten: `{name}`" for name in sorted(store.forgotten)[:REASONS]]
        left_out = names_left_out(store)
        lines += [f"- skipped `{name}`: {reason}" for name, reason in left_out[:REASONS]]
        lines += [f"- and {len(left_out) - REASONS:,} more"] if len(left_out) > REASONS else []
        return "\n".join(lines)

    def forget(self, names: str) -> str:
        """Forgets images of the open store, so that no search finds them; returns what it holds now.

        Args:
          names: names of images, one a line.

        Raises:
          UserError: as ``store.forgetting.forget``; then nothing is forgotten.
        """
        wanted = [name.strip() for name in names.splitlines() if name.strip()]
        if not wanted:
            raise UserError("no image is named; give the names as the tab Where from shows them, one a line")
        directory = self.pipeline.datastore.directory
        forget(directory, wanted)
        return self.open(str(directory))

    def build(self, name: str, source: str, uploads: Sequence[str] = ()) -> Iterator[str]:
        """Builds a store of a folder, or of uploaded files, and opens it; yields lines that say how far it is.

        Args:
          name: the store's name below the studio's folder.
          source: a folder of images, a tar or a Parquet file; unused with uploads.
          uploads: paths of files.

        Raises:
          UserError: if the name or the source is not valid, or no image can be read.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise UserError(f"the name {name!r} is not one of a folder; give a word such as holidays")
        directory = self.folder / name
        if uploads:
            pictures = self.folder / f"{name}_uploads"
            pictures.mkdir(parents=True, exist_ok=True)
            for path in uploads:
                shutil.copy(path, pictures / Path(path).name)
            source = str(pictures)
        if not source:
            raise UserError("nothing to store; give a folder, or choose files")
        keys = ("codebook", HIDDEN.name) if any("hidden" in x or "gated" in x for x in self.methods) else ("codebook",)
        config = DatastoreConfig(
            self.config.model, source, keys=keys, captions=HIDDEN.name in keys, indexes=(), max_bad_fraction=0.5
        )
        failures: list[BaseException] = []

        def work() -> None:
            try:
                build.build(config, directory)
            except Exception as error:
                failures.append(error)

        thread, start = threading.Thread(target=work, name="building", daemon=True), time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            files = sum(1 for _ in directory.rglob("*")) if directory.is_dir() else 0
            yield f"building {name}: {time.monotonic() - start:.0f} s, {files} files written"
        if failures:
            raise failures[0]
        yield self.open(str(directory))

    def stores(self) -> list[str]:
        """Returns the finished stores of the studio's folder, and the open one."""
        own = sorted(str(path.parent) for path in self.folder.glob(f"*/{MANIFEST}"))
        return list(dict.fromkeys([str(self.pipeline.datastore.directory), *own]))
