"""The studio's stores: which one is open, what it holds, and new ones built from a visitor's pictures."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from arrag_jax.config import DatastoreConfig, DrawConfig
from arrag_jax.data.registry import open_source
from arrag_jax.decode.gates import OF_PROMPT
from arrag_jax.decode.methods import BASELINE, METHODS, Search
from arrag_jax.errors import UserError, printable
from arrag_jax.evaluation.pipeline import Pipeline, open_pipeline
from arrag_jax.ops.keys import HIDDEN
from arrag_jax.retrieval import build
from arrag_jax.retrieval.index import index_directory
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.forgetting import forget
from arrag_jax.store.hidden import backbones_in
from arrag_jax.store.images import names_left_out
from arrag_jax.store.shards import MANIFEST
from arrag_jax.web.watched import Watched

REASONS = 20  # skipped files that are listed
UPLOADS = ".uploads"  # folder of visitors' pictures beside the stores, whose names never begin so
CAPTIONS, HIDDEN_KEYS = "captions", "hidden keys"  # what methods need of a store
WITHOUT_CAPTIONS = "daid"  # the method that any store can do
LOOK_SECONDS = 0.5  # how often a build says how far it is


class Shelf:
    """The open store and its pipeline.

    Attributes:
      config: the settings that the pipeline was opened with.
      methods: those that were asked for; a store offers the ones that it has captions and keys for.
      pipeline: replaced as a whole when another store is opened; drawings that run keep theirs.
    """

    def __init__(self, config: DrawConfig, methods: Sequence[str], folder: Path):
        """Opens the config's store; new stores are built in ``folder``."""
        self.config, self.methods, self.folder = config, tuple(methods), folder
        self.pipeline: Pipeline = self._opened(config.retrieval.store)
        self._lock = threading.Lock()

    def _opened(self, directory: str) -> Pipeline:
        retrieval = dataclasses.replace(self.config.retrieval, store=directory)
        if not (Path(directory) / MANIFEST).is_file():  # on the hub, or an error that names the mend
            return open_pipeline(dataclasses.replace(self.config, retrieval=retrieval), self.methods)
        store = Datastore.open(Path(directory))
        offered = tuple(name for name in self.methods if self._needs(name) <= _has(store))
        if not set(offered) - {BASELINE}:
            offered = (BASELINE, WITHOUT_CAPTIONS)
        if retrieval.search == "auto" and not index_directory(store, retrieval.keys).exists():
            retrieval = dataclasses.replace(retrieval, search="dense")
        return open_pipeline(dataclasses.replace(self.config, retrieval=retrieval), offered)

    def _needs(self, method: str) -> set[str]:
        """Returns what a store must have for a method: captions, hidden keys."""
        chosen = METHODS[method] if method in METHODS else METHODS[BASELINE]  # the pipeline refuses unknown ones
        gate = chosen.gate(self.config).features if chosen.gate else ()
        captions = {CAPTIONS} if chosen.limited or set(gate) & set(OF_PROMPT) else set()
        return captions | ({HIDDEN_KEYS} if chosen.search is Search.HIDDEN or gate else set())

    def open(self, store: str) -> str:
        """Opens another store; returns what it holds.

        Raises:
          UserError: if there is none, or if it does not fit the model; the store that was open stays so.
        """
        if not (Path(store) / MANIFEST).is_file():
            raise UserError(f"{store or 'the empty path'} holds no finished datastore; build one from pictures")
        with self._lock:
            self.pipeline = self._opened(store)
        return self.report()

    def report(self) -> str:
        """Returns in Markdown what the open store holds."""
        store = self.pipeline.datastore
        keys = (*store.settings.keys, *((HIDDEN.name,) if backbones_in(store.directory) else ()))
        lines = [
            f"**{store.directory}**: {store.num_images:,} images, {store.num_patches:,} patches, "
            f"keys: {', '.join(keys)}, from `{store.settings.source}`",
            f"- methods: {', '.join(self.pipeline.methods)}",
        ]
        closed = [name for name in self.methods if name not in self.pipeline.methods]
        if closed:
            lacks = sorted(set().union(*map(self._needs, closed)) - _has(store))
            lines += [f"- not open: {', '.join(closed)}, because the store has no {' and no '.join(lacks)}"]
        lines += [f"- forgotten: `{name}`" for name in sorted(store.forgotten)[:REASONS]]
        left_out = names_left_out(store)
        lines += [f"- skipped `{name}`: {reason}" for name, reason in left_out[:REASONS]]
        lines += [f"- and {len(left_out) - REASONS:,} more"] if len(left_out) > REASONS else []
        return "\n".join(lines)

    def forget(self, names: str, store: Path | None = None) -> str:
        """Forgets images of a store, so that no search finds them; returns what the open store holds now.

        Args:
          names: names of images, one a line.
          store: its folder; None = the open one.

        Raises:
          UserError: as ``store.forgetting.forget``; then nothing is forgotten.
        """
        wanted = [name.strip() for name in names.splitlines() if name.strip()]
        if not wanted:
            raise UserError("no image is named; give the names as the tab Where from shows them, one a line")
        opened = self.pipeline.datastore.directory
        forget(store or opened, wanted)
        return self.open(str(opened))

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
        if (directory / MANIFEST).is_file():
            raise UserError(f"{directory} is a finished store already; open it, or give another name")
        if uploads:
            source = str(_copied(uploads, self.folder / UPLOADS / name))
        if not source:
            raise UserError("nothing to store; give a folder, or choose files")
        config = DatastoreConfig(self.config.model, source, keys=("codebook",), indexes=(), max_bad_fraction=0.5)
        failures: list[BaseException] = []
        reasons: list[str] = []
        watched = Watched()

        def work() -> None:
            try:
                told = dataclasses.replace(config, captions=_has_captions(config, self.pipeline.model.image_size))
                build.build(told, directory, engine=watched)
                if told.captions and any(HIDDEN_KEYS in self._needs(name) for name in self.methods):
                    reasons.extend(_with_hidden(told, directory, watched))
            except Exception as error:
                failures.append(error)

        thread, start = threading.Thread(target=work, name="building", daemon=True), time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            yield f"{watched.told() or f'{directory} begins'} ({time.monotonic() - start:.0f} s so far)"
        if failures:
            raise failures[0]
        yield "\n".join([self.open(str(directory)), *(f"- no hidden keys: {reason}" for reason in reasons)])

    def stores(self) -> list[str]:
        """Returns the finished stores of the studio's folder, and the open one."""
        own = sorted(str(path.parent) for path in self.folder.glob(f"*/{MANIFEST}"))
        return list(dict.fromkeys([str(self.pipeline.datastore.directory), *own]))


def _has(store: Datastore) -> set[str]:
    """Returns which of captions and hidden keys a store has."""
    captions = {CAPTIONS} if store.settings.captions and any(store.captions) else set()
    return captions | ({HIDDEN_KEYS} if backbones_in(store.directory) else set())


def _has_captions(config: DatastoreConfig, size: tuple[int, int]) -> bool:
    """Returns whether a build can take captions from the source; other faults are left to the build."""
    try:
        open_source(config.source, config.data_dir, size, captions=True)
    except UserError:
        return False
    return True


def _with_hidden(config: DatastoreConfig, directory: Path, watched: Watched) -> list[str]:
    """Adds hidden keys to a store; returns the reason why the model cannot read its captions, if it cannot."""
    try:
        build.build(dataclasses.replace(config, keys=(*config.keys, HIDDEN.name)), directory, engine=watched)
    except UserError as error:
        return [printable(error)]
    return []


def _copied(uploads: Sequence[str], folder: Path) -> Path:
    """Returns a folder with the uploaded files alone; of equal names, the later ones get a number."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in map(Path, uploads):
        names = (path.name, *(f"{path.stem}_{number}{path.suffix}" for number in range(2, len(uploads) + 1)))
        shutil.copy(path, next(folder / name for name in names if not (folder / name).exists()))
    return folder
