"""The datastore: code grids on disk, from which keys, next codes and provenance all follow.

One directory::

  manifest.json                           what the store is; written last, so a store is whole when it is there
  codebook.npz                            "codebook", float32 [V, C], rows of unit norm
  codes-00000-of-00004.arrayrecord        one image a record: uint16 little-endian [H, W]
  latents-00000-of-00004.arrayrecord      kind "latent" only: float16 little-endian [H, W, C], rows of unit norm
  sources-00000-of-00004.txt              one image a line: where it came from ("emoji_scenes/full/store/17",
                                          "holiday/beach.jpg", "shard-17.tar!000123.jpg")
  captions-00000-of-00004.txt             with captions only: one image a line, what its caption says
  bad-00000-of-00004.txt                  only where there are any: what could not be read, a tab, and why
  part-00001/ …                           what was added later, each a store of its own with all of the above

Keys are not stored. A key is the four context cells' vectors side by side (``ops.grid``), which are either
rows of the codebook (kind "codebook") or the encoder's l2-normalised output before quantisation (kind
"latent", the official choice: docs/reference.md quirk 19). A 24 x 24 image takes at most 1.15 KB plus its source's
name, and each file of codes 128 KiB more. Images are numbered without the bad ones, those of a segment after the ones
before it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, UInt16

from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.parsing import in_range
from arrag_jax.store.shards import (
    MANIFEST,
    ShardFolder,
    ShardSettings,
    content_hash,
    reading,
    require_count,
    require_digest,
)

CODEBOOK = "codebook.npz"
SAME_IN_ALL_SEGMENTS = ("fingerprint", "grid", "codebook_size", "code_dim", "keys", "captions")
GROW = ("keys", "captions")  # of these a whole store can be given more
# Files that a whole store can be given later; see ``store.extension``
FURTHER = ("captions-", *(f"{kind.file}-" for kind in KEY_KINDS.values() if kind.file != "codes"))


@dataclasses.dataclass(frozen=True)
class StoreSettings(ShardSettings):
    """What decides a store's content; ``manifest.json`` holds these fields and its files.

    Attributes, beside those of every folder of shards:
      code_dim: C.
      keys: kinds of key that can be had, of ``KEY_KINDS``.
      captions: are the images' captions kept?
      keep_duplicates: were images taken whose content is there already? A record.
      command: the command that began the build; with ``model``, ``data_dir`` and ``batch_size``, its config's, a record
        that is never compared.
    """

    code_dim: int
    keys: tuple[str, ...]
    captions: bool = False
    command: str = dataclasses.field(default="", compare=False)
    keep_duplicates: bool = dataclasses.field(default=False, compare=False)
    model: str = dataclasses.field(default="", compare=False)
    data_dir: str = dataclasses.field(default="", compare=False)
    batch_size: int = dataclasses.field(default=0, compare=False)
    other_files: ClassVar[tuple[str, ...]] = (CODEBOOK,)

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.keys) - set(KEY_KINDS))
        if unknown or not self.keys:
            raise UserError(f"keys={list(self.keys)}: choose from {', '.join(KEY_KINDS)}")
        if self.codebook_size > 2**16:
            raise UserError(f"a codebook of {self.codebook_size} codes does not fit uint16; at most 65536")
        in_range("code_dim", self.code_dim, 1, 2**16)
        if self.grid[0] < 2 or self.grid[1] < 3:
            height, width = self.grid
            raise UserError(f"a {height} x {width} grid has no cell with a full context; at least 2 x 3 is needed")

    @property
    def patches_per_image(self) -> int:
        return (self.grid[0] - 1) * (self.grid[1] - 2)

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of each kind of content ("codes", "sources", "captions" and "latents" if held) of a shard."""
        place = self.place(shard)
        files = {"codes": f"codes-{place}.arrayrecord", "sources": f"sources-{place}.txt"}
        if self.captions:
            files["captions"] = f"captions-{place}.txt"
        parts = (KEY_KINDS[kind].file for kind in self.keys)
        return files | {part: f"{part}-{place}.arrayrecord" for part in parts if part not in files}


@dataclasses.dataclass(frozen=True)
class Datastore(ShardFolder):
    """A whole store, opened. Arrays are read on first use and kept; treat them as read-only.

    ``num_images`` is how many images count, the first ones; fewer than stored in a ``subset``.
    ``settings`` are those of the first segment; all segments have its tokenizer, grid and kinds of key.
    """

    settings: StoreSettings
    segments: tuple["Datastore", ...] = ()  # what was added later

    noun: ClassVar[str] = "datastore"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = StoreSettings
    command: ClassVar[str] = "build_datastore"
    rebuild: ClassVar[str] = (
        "build it with: python -m arrag_jax.build_datastore --config=… --workdir=… (in manifest.json), "
        "once its folder is deleted"
    )

    @classmethod
    def open(cls, directory: str | Path) -> "Datastore":
        """Opens a store and the segments added to it; as ``ShardFolder.open``."""
        store = super().open(directory)
        segments = tuple(
            cls._open_segment(store, name, digest) for name, digest in store.manifest.get("parts", {}).items()
        )
        return dataclasses.replace(store, segments=segments, num_images=sum(x.num_images for x in (store, *segments)))

    @classmethod
    def _open_segment(cls, store: "Datastore", name: str, fingerprint: str) -> "Datastore":
        if not (store.directory / name).is_dir() or name in store.files:
            raise UserError(f"{store.directory / name}, a segment of the datastore, is missing; {cls.rebuild}")
        segment = super().open(store.directory / name)
        if segment.manifest.get("parts"):
            raise UserError(f"{segment.directory} is a segment, but its manifest names others; {cls.rebuild}")
        ours, theirs = store.settings, segment.settings
        differ = [x for x in SAME_IN_ALL_SEGMENTS if x not in GROW and getattr(ours, x) != getattr(theirs, x)]
        # While keys or captions are added, segments have them before the store says so.
        differ += ["keys"] if not set(ours.keys) <= set(theirs.keys) else []
        differ += ["captions"] if ours.captions > theirs.captions else []
        if differ:
            raise UserError(f"{segment.directory} has another {differ[0]} than {store.directory}; {cls.rebuild}")
        # older stores name a segment by the hash of its manifest
        if fingerprint != segment.store_fingerprint and fingerprint != sha256_of(segment.directory / MANIFEST):
            raise UserError(f"{segment.directory} is not the segment that {store.directory} was given; {cls.rebuild}")
        return segment

    @functools.cached_property
    def store_fingerprint(self) -> str:
        """SHA-256 of all that decides the stored patches: two stores share it only if they hold the same ones.

        Latents and captions, which can be added to a whole store, do not count.
        """
        apart = {field.name for field in dataclasses.fields(self.settings) if not field.compare} | {"keys", "captions"}
        content = {
            "settings": {key: value for key, value in self.manifest["settings"].items() if key not in apart},
            "files": {name: facts for name, facts in self.files.items() if not name.startswith(FURTHER)},
            "parts": [segment.store_fingerprint for segment in self.segments],
        }
        return content_hash(content)

    def verify(self) -> None:
        """Checks every file's SHA-256, those of all segments too; as ``ShardFolder.verify``."""
        super().verify()
        for segment in self.segments:
            segment.verify()

    def subset(self, num_images: int) -> "Datastore":
        """The store of the first ``num_images`` images; their row numbers stay the same."""
        if not 1 <= num_images <= self.num_images:
            raise UserError(f"num_images={num_images}: datastore {self.directory} has 1 to {self.num_images}")
        return dataclasses.replace(self, num_images=num_images)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.num_images * self.settings.patches_per_image

    @property
    def num_bad(self) -> int:
        """Images that could not be read."""
        return super().num_bad + sum(segment.num_bad for segment in self.segments)

    @property
    def num_duplicates(self) -> int:
        """Images that were left out because they are there already, those of merged stores too."""
        own = super().num_duplicates + self.manifest.get("duplicates", 0)
        return own + sum(segment.num_duplicates for segment in self.segments)

    @property
    def alone(self) -> "Datastore":
        """The store without the segments that were added later."""
        return dataclasses.replace(self, segments=(), num_images=self.count_images(self.settings, self.manifest))

    @property
    def wholes(self) -> tuple["Datastore", ...]:
        """The stores that this one consists of, each without segments: itself alone, then what was added."""
        return (self.alone, *self.segments)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """What was left out, and why; those of all segments too."""
        return super().bad + [line for segment in self.segments for line in segment.bad]

    @functools.cached_property
    def codebook(self) -> Float[np.ndarray, "V C"]:
        """Rows of unit norm, float32."""
        path, shape = self.directory / CODEBOOK, (self.settings.codebook_size, self.settings.code_dim)
        with self._reading(path):
            content = path.read_bytes()
            if 4 * math.prod(shape) > len(content):  # it is not compressed
                raise ValueError(f"it cannot hold {shape[0]} rows of {shape[1]} numbers")
            require_digest(hashlib.sha256(content).hexdigest(), self.files[CODEBOOK])
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                codebook = file["codebook"]
            if codebook.shape != shape or codebook.dtype != np.float32 or not np.isfinite(codebook).all():
                raise ValueError(f"it holds {codebook.dtype} {codebook.shape}, not finite float32 {shape}")
            return codebook

    @property
    def codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of all images."""
        return self.records("codes")

    def codes_of(self, first: int, end: int) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of the images ``first`` to ``end``; opens only the files that hold some of them."""
        return self.records_of("codes", first, end)

    def records(self, part: str) -> np.ndarray:
        """A part's records of all images; see ``records_of``."""
        if part not in self._whole:
            self._whole[part] = self.records_of(part, 0, self.num_images)
        return self._whole[part]

    @functools.cached_property
    def _whole(self) -> dict[str, np.ndarray]:
        return {}

    def records_of(self, part: str, first: int, end: int) -> np.ndarray:
        """What keys are made of, for the images ``first`` to ``end``.

        Args:
          part: ``KeyKind.file`` of a kind: "codes", or "latents" (unit-norm encoder outputs before quantisation).

        Raises:
          UserError: no such part here.
        """
        kind = next(kind for kind in KEY_KINDS.values() if kind.file == part)
        if part != "codes":
            self.require_kind(kind.name)
        shape = kind.record_shape(self.settings.grid, self.settings.code_dim)
        return self._read(part, kind.dtype, shape, first, end)

    @functools.cached_property
    def sources(self) -> list[str]:
        """Where each image came from."""
        return self._lines("sources")

    @functools.cached_property
    def captions(self) -> list[str]:
        """What each image shows, in words.

        Raises:
          UserError: the store was built without them.
        """
        if not self.settings.captions:
            raise UserError(
                f"datastore {self.directory} holds no captions; build one with --config.captions=True, or add them: "
                f"{self.further('--config.captions=True')}"
            )
        return self._lines("captions")

    def require_kind(self, kind: str) -> None:
        """Raises UserError unless the store holds keys of this kind."""
        if kind not in self.settings.keys:
            held = self.settings.keys
            mend = self.further(f"--config.keys={','.join((*held, kind))}", f"--config.indexes={kind}")
            raise UserError(
                f"datastore {self.directory} holds keys of kind {', '.join(held)}, not {kind!r}; add: {mend}"
            )

    def further(self, *flags: str) -> str:
        """The command that adds to this store what the flags say."""
        words = ["python", "-m", "arrag_jax.build_datastore", *flags, f"--workdir={self.directory}"]
        return shlex.join(words)

    def _files(self, kind: str, first: int, end: int) -> Iterator[tuple["Datastore", str, slice]]:
        """The files that hold images ``first`` to ``end``: whose they are, their names, and which images are meant."""
        before = 0
        for store in (self, *self.segments):
            for shard in range(store.settings.num_shards):
                name = store.settings.shard_files(shard)[kind]
                images = store.files[name]["images"]
                wanted = slice(max(first - before, 0), min(end - before, images))
                if wanted.start < wanted.stop:
                    yield store, name, wanted
                before += images

    def _lines(self, kind: str) -> list[str]:
        """All lines of one kind of content, one an image."""
        lines: list[str] = []
        for store, name, wanted in self._files(kind, 0, self.num_images):
            lines += store.lines_of(name)[wanted]
        return lines

    def _read(self, kind: str, dtype: str, shape: tuple[int, ...], first: int, end: int) -> np.ndarray:
        """Records of one kind of content as arrays of one shape, [end - first, *shape].

        A record has a hash in its file, which its reader checks. The hash of a file of codes is checked besides where
        all of it is read: a file of the same size may stand in another's place.
        """
        whole, done = None, 0
        for store, name, wanted in self._files(kind, first, end):
            path, facts, number = store.directory / name, store.files[name], wanted.stop - wanted.start
            with self._reading(path), contextlib.closing(ArrayRecordReader(str(path))) as reader:
                require_count(range(reader.num_records()), facts["images"])
                if whole is None:  # before memory is taken for a grid that the files do not have
                    require_length(reader.read(wanted.start, wanted.start + 1)[0], dtype, shape)
                    whole = np.empty((end - first, *shape), dtype)
                if kind == "codes" and number == facts["images"]:
                    require_digest(sha256_of(path), facts)
                found = np.frombuffer(b"".join(reader.read(wanted.start, wanted.stop)), dtype)
                whole[done : done + number] = found.reshape(number, *shape)
                if kind == "codes" and found.max(initial=0) >= self.settings.codebook_size:
                    raise ValueError(f"it holds code {found.max()}, the codebook {self.settings.codebook_size}")
            done += number
        whole = np.empty((0, *shape), dtype) if whole is None else whole  # shards of nothing but duplicates hold none
        assert done == len(whole) == end - first
        return whole

    @property
    def verify_command(self) -> str:
        """How a user sees what else is damaged."""
        return f"python -m arrag_jax.build_datastore --workdir={self.directory} --verify"

    def _reading(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return reading(path, self.verify_command, self.rebuild)


def require_length(record: bytes, dtype: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a record holds an array of this shape."""
    if len(record) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"its records have {len(record)} bytes, not those of {list(shape)} numbers")
