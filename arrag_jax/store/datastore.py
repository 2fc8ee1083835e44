"""The datastore: code grids on disk, from which keys, next codes and provenance are computed.

One directory::

  manifest.json                           what the store is; written last, so a store that has it is complete
  codebook.npz                            "codebook", float32 [V, C], rows of unit norm
  codes-00000-of-00004.arrayrecord        one record per image: uint16 little-endian [H, W]
  latents-00000-of-00004.arrayrecord      kind "latent" only: float16 little-endian [H, W, C], rows of unit norm
  sources-00000-of-00004.txt              one line per image: where it came from ("emoji_scenes/full/store/17",
                                          "holiday/beach.jpg", "shard-17.tar!000123.jpg")
  captions-00000-of-00004.txt             only in stores with captions: one line per image, its caption
  bad-00000-of-00004.txt                  only if images were left out: one line per image, its id, a tab and the reason
  forgotten.json                          only if images were forgotten: their names; see ``store.forgetting``
  rights-00000-of-00004.txt               only in stores with rights: one line per image; see ``data.stated_rights``
  rights.jsonl                            only if rights were recorded later; see ``store.rights``
  part-00001/ …                           segments added later; each is a store of its own with all of the above
  hidden-0123456789abcdef/ …              keys of kind "hidden" of one backbone; see ``store.hidden``

Keys are not stored. A key is the concatenation of the vectors of the four context positions (``ops.grid``). The vectors
are rows of the codebook (kind "codebook") or the encoder's l2-normalised output before quantisation (kind "latent", the
official choice: docs/reference.md quirk 19). A 24 x 24 image takes at most 1.15 KB plus its source's name, and each
file of codes takes 128 KiB more. Image numbers skip the images left out, and continue from one segment to the next.
"""

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, UInt16

from arrag_jax.config import BY_HABIT, ColumnsConfig
from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of
from arrag_jax.ops.keys import HIDDEN, KEY_KINDS, KINDS_BY_FILE, TOKENIZER_KINDS
from arrag_jax.parsing import in_range
from arrag_jax.store.hidden import HiddenFolder, backbones_in, folder_of, open_hidden, records_of_all
from arrag_jax.store.record_files import read_array, read_records
from arrag_jax.store.shards import MANIFEST, ShardFolder, ShardSettings, content_hash, reading
from arrag_jax.store.shown import ShownImages, forgotten_in

CODEBOOK = "codebook.npz"
SAME_IN_ALL_SEGMENTS = ("fingerprint", "grid", "codebook_size", "code_dim", "keys", "captions", "rights")
GROW = ("keys", "captions")  # settings that can be extended in a complete store
FURTHER = ("captions-", "rights-", *(f"{file}-" for file in KINDS_BY_FILE if file != "codes"))  # no patches


@dataclasses.dataclass(frozen=True)
class StoreSettings(ShardSettings):
    """The settings that determine a store's content; ``manifest.json`` holds them.

    Attributes (besides those of ``ShardSettings``):
      code_dim: C.
      keys: the kinds of key (names in ``TOKENIZER_KINDS``) that the store's own files provide.
      captions, rights: whether the images' captions, and their licences and sources, are stored.
      columns: the columns of Parquet files that were read.
      keep_duplicates: whether images with equal content are all stored. A record, never compared.
      command: the command that started the build. A record, like ``model``, ``data_dir`` and ``batch_size`` of its
        config.
    """

    code_dim: int
    keys: tuple[str, ...]
    captions: bool = False
    rights: bool = False
    columns: ColumnsConfig = BY_HABIT
    command: str = dataclasses.field(default="", compare=False)
    keep_duplicates: bool = dataclasses.field(default=False, compare=False)
    model: str = dataclasses.field(default="", compare=False)
    data_dir: str = dataclasses.field(default="", compare=False)
    batch_size: int = dataclasses.field(default=0, compare=False)
    other_files: ClassVar[tuple[str, ...]] = (CODEBOOK,)

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.keys) - set(TOKENIZER_KINDS))
        if unknown or not self.keys:
            raise UserError(f"keys={list(self.keys)}: choose from {', '.join(TOKENIZER_KINDS)}")
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
        """Returns kind of content → file name for a shard: "codes", "sources", …; "captions", … if held."""
        place = self.place(shard)
        files = {"codes": f"codes-{place}.arrayrecord", "sources": f"sources-{place}.txt"}
        texts = ("captions", "captions", self.captions), ("rights_lines", "rights", self.rights)
        files |= {kind: f"{name}-{place}.txt" for kind, name, held in texts if held}
        parts = (TOKENIZER_KINDS[kind].file for kind in self.keys)
        return files | {part: f"{part}-{place}.arrayrecord" for part in parts if part not in files}


@dataclasses.dataclass(frozen=True)
class Datastore(ShownImages, ShardFolder):
    """A complete, opened store. Arrays are read on first use and cached; treat them as read-only.

    Only the first ``num_images`` images are visible; in a ``subset`` these are fewer than the stored ones.
    ``settings`` are those of the first segment; all segments share its tokenizer, grid and kinds of key.
    """

    settings: StoreSettings
    segments: tuple["Datastore", ...] = ()  # the segments added later
    backbone: str = ""  # fingerprint of the backbone whose hidden states serve as keys; "" = none

    noun: ClassVar[str] = "datastore"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = StoreSettings
    command: ClassVar[str] = "build_datastore"

    @classmethod
    def open(cls, directory: str | Path) -> "Datastore":
        """Opens a store and its segments; checks and errors as in ``ShardFolder.open``."""
        store = super().open(directory)
        segments = tuple(
            cls._open_segment(store, name, digest) for name, digest in store.manifest.get("parts", {}).items()
        )
        images, names = sum(x.num_images for x in (store, *segments)), forgotten_in(store.directory)
        return dataclasses.replace(store, segments=segments, num_images=images, forgotten=names)

    @classmethod
    def _open_segment(cls, store: "Datastore", name: str, fingerprint: str) -> "Datastore":
        if not (store.directory / name).is_dir() or name in store.files:
            raise UserError(f"{store.directory / name}, a segment of the datastore, is missing; {cls.rebuild}")
        segment = super().open(store.directory / name)
        if segment.manifest.get("parts"):
            raise UserError(f"{segment.directory} is a segment, but its manifest names others; {cls.rebuild}")
        ours, theirs = store.settings, segment.settings
        differ = [x for x in SAME_IN_ALL_SEGMENTS if x not in GROW and getattr(ours, x) != getattr(theirs, x)]
        # While keys or captions are added, the manifests of the segments name them before the store's does.
        differ += ["keys"] if not set(ours.keys) <= set(theirs.keys) else []
        differ += ["captions"] if ours.captions > theirs.captions else []
        if differ:
            raise UserError(f"{segment.directory} has another {differ[0]} than {store.directory}; {cls.rebuild}")
        if fingerprint != segment.store_fingerprint and fingerprint != sha256_of(segment.directory / MANIFEST):
            raise UserError(f"{segment.directory} is not the segment that {store.directory} was given; {cls.rebuild}")
        return segment

    @functools.cached_property
    def store_fingerprint(self) -> str:
        """SHA-256 of what determines the stored patches: stores with the same fingerprint hold the same patches.

        Latents, captions and rights do not count: they can be added to a complete store, and change no patch.
        """
        apart = {field.name for field in dataclasses.fields(self.settings) if not field.compare} | {*GROW, "rights"}
        content = {
            "settings": {key: value for key, value in self.manifest["settings"].items() if key not in apart},
            "files": {name: facts for name, facts in self.files.items() if not name.startswith(FURTHER)},
            "parts": [segment.store_fingerprint for segment in self.segments],
        }
        return content_hash(content)

    def verify(self) -> None:
        """Checks the SHA-256 of every file, including all segments; errors as in ``ShardFolder.verify``."""
        super().verify()
        for backbone in backbones_in(self.directory):
            HiddenFolder.open(folder_of(self.directory, backbone)).verify()
        for segment in self.segments:
            segment.verify()

    def subset(self, num_images: int) -> "Datastore":
        """Returns the store of the first ``num_images`` images; their row numbers stay the same."""
        if not 1 <= num_images <= self.num_images:
            raise UserError(f"num_images={num_images}: datastore {self.directory} has 1 to {self.num_images}")
        return dataclasses.replace(self, num_images=num_images)

    @property
    def num_patches(self) -> int:
        """N, the number of stored patches."""
        return self.num_images * self.settings.patches_per_image

    @property
    def num_bad(self) -> int:
        """Number of images that could not be read, in all segments."""
        return super().num_bad + sum(segment.num_bad for segment in self.segments)

    @property
    def num_duplicates(self) -> int:
        """Number of images left out as duplicates, in all segments and during merges."""
        own = super().num_duplicates + self.manifest.get("duplicates", 0)
        return own + sum(segment.num_duplicates for segment in self.segments)

    @property
    def alone(self) -> "Datastore":
        """The store without the segments that were added later."""
        return dataclasses.replace(self, segments=(), num_images=self.count_images(self.settings, self.manifest))

    @property
    def wholes(self) -> tuple["Datastore", ...]:
        """The stores that this one consists of, each without segments: the first one, then those added later."""
        return (self.alone, *self.segments)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """The (image id, reason) of each image left out, in all segments."""
        return super().bad + [line for segment in self.segments for line in segment.bad]

    @functools.cached_property
    def codebook(self) -> Float[np.ndarray, "V C"]:
        """The codebook, float32, rows of unit norm."""
        shape = self.settings.codebook_size, self.settings.code_dim
        with self._reading(self.directory / CODEBOOK):
            return read_array(self.directory / CODEBOOK, "codebook", shape, self.files[CODEBOOK])

    def table(self, kind: str) -> Float[np.ndarray, "n_table C"]:
        """Returns the table of a kind of key (``ops.keys.kind``): the codebook, or the projection of hidden states."""
        return self.hidden[0].table if kind == HIDDEN.name else self.codebook

    def keys_fingerprint(self, kind: str) -> str:
        """Returns the identity of the stored patches and of their keys of this kind."""
        if kind != HIDDEN.name:
            return self.store_fingerprint
        return content_hash({"datastore": self.store_fingerprint, "hidden": [x.store_fingerprint for x in self.hidden]})

    def num_rows(self, kind: str) -> int:
        """Returns N, the number of stored patches that have a key of this kind."""
        return self.num_images * len(KEY_KINDS[kind].positions(self.settings.grid))

    @functools.cached_property
    def hidden(self) -> tuple[HiddenFolder, ...]:
        """The folders of the backbone's hidden keys, one for each of ``wholes``.

        Raises:
          UserError: if one is missing or damaged, or if they have different projections.
        """
        return open_hidden([(x.directory, x.store_fingerprint) for x in self.wholes], self.backbone, self.further)

    @property
    def codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of all images."""
        return self.records("codes")

    def codes_of(self, first: int, end: int) -> UInt16[np.ndarray, "n H W"]:
        """Returns the code grids of images ``first`` to ``end`` (exclusive); opens only the files that hold them."""
        return self.records_of("codes", first, end)

    def records(self, part: str) -> np.ndarray:
        """Returns the records of all images and caches them; see ``records_of``."""
        if part not in self._whole:
            self._whole[part] = self.records_of(part, 0, self.num_images)
        return self._whole[part]

    @functools.cached_property
    def _whole(self) -> dict[str, np.ndarray]:
        return {}

    def records_of(self, part: str, first: int, end: int) -> np.ndarray:
        """Returns the records from which keys are computed, for images ``first`` to ``end`` (exclusive).

        Args:
          part: a ``KeyKind.file``: "codes", "latents" (unit-norm encoder outputs before quantisation), or "hidden".

        Raises:
          UserError: if the store holds no such records.
        """
        if part == HIDDEN.file:
            return records_of_all(self.hidden, first, end)
        kind = KINDS_BY_FILE[part]
        if part != "codes":
            self.require_kind(kind.name)
        shape = kind.record_shape(self.settings.grid, self.settings.code_dim)
        return self._read(part, kind.dtype, shape, first, end)

    @functools.cached_property
    def sources(self) -> list[str]:
        """The id of each image: one line that says where it came from."""
        return self._lines("sources")

    @functools.cached_property
    def captions(self) -> list[str]:
        """The caption of each image.

        Raises:
          UserError: if the store was built without captions.
        """
        if not self.settings.captions:
            raise UserError(
                f"datastore {self.directory} holds no captions; build one with --config.captions=True, or add them: "
                f"{self.further('--config.captions=True')}"
            )
        return self._lines("captions")

    def require_kind(self, kind: str) -> None:
        """Raises UserError unless the store holds keys of this kind."""
        if kind == HIDDEN.name:
            _ = self.hidden  # raises
        elif kind not in self.settings.keys:
            held = self.settings.keys
            mend = self.further(f"--config.keys={','.join((*held, kind))}", f"--config.indexes={kind}")
            raise UserError(
                f"datastore {self.directory} holds keys of kind {', '.join(held)}, not {kind!r}; add: {mend}"
            )

    def further(self, *flags: str) -> str:
        """Returns the shell command that extends this store as the flags say."""
        return shlex.join(["python", "-m", "arrag_jax.build_datastore", *flags, f"--workdir={self.directory}"])

    def _files(self, kind: str, first: int, end: int) -> Iterator[tuple["Datastore", str, slice]]:
        """Yields the store, file name and slice within that file for each file with images ``first`` to ``end``."""
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
        """Returns the lines of one kind of content, one per image."""
        files = self._files(kind, 0, self.num_images)
        return [line for store, name, wanted in files for line in store.lines_of(name)[wanted]]

    def _read(self, kind: str, dtype: str, shape: tuple[int, ...], first: int, end: int) -> np.ndarray:
        """Returns the records of one kind of content as an array [end - first, *shape].

        When all of a codes file is read, the file's hash is checked, too.
        """
        whole, done = np.empty((0, *shape), dtype), 0  # a shard of duplicates alone is empty
        for store, name, wanted in self._files(kind, first, end):
            path, number = store.directory / name, wanted.stop - wanted.start
            with self._reading(path):
                found = read_records(path, store.files[name], dtype, shape, wanted, check=kind == "codes")
                if kind == "codes" and found.max(initial=0) >= self.settings.codebook_size:
                    raise ValueError(f"it holds code {found.max()}, the codebook {self.settings.codebook_size}")
            if not done:
                whole = np.empty((end - first, *shape), dtype)
            whole[done : done + number] = found
            done += number
        assert done == len(whole) == end - first
        return whole

    @property
    def verify_command(self) -> str:
        """The command that checks the whole store for damage."""
        return f"python -m arrag_jax.build_datastore --workdir={self.directory} --verify"

    def _reading(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return reading(path, self.verify_command, self.rebuild)
