"""The datastore: code grids on disk, from which keys, next codes and provenance all follow.

One directory::

  manifest.json                           what the store is; written last, so a store is whole when it is there
  codebook.npz                            "codebook", float32 [V, C], rows of unit norm
  codes-00000-of-00004.arrayrecord        one image a record: uint16 little-endian [H, W]
  latents-00000-of-00004.arrayrecord      kind "latent" only: float16 little-endian [H, W, C], rows of unit norm
  sources-00000-of-00004.txt              one image a line: where it came from ("emoji_scenes/full/store/17")
  captions-00000-of-00004.txt             with captions only: one image a line, what its caption says

Keys are not stored. A key is the four context cells' vectors side by side (``ops.grid``), which are either
rows of the codebook (kind "codebook") or the encoder's l2-normalised output before quantisation (kind
"latent", the official choice: reference quirk 19). A 24 x 24 image takes 1.15 KB plus its source's name.
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, Int, UInt16

from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval.shards import ShardFolder, ShardSettings

KEY_KINDS = ("codebook", "latent")
CODEBOOK = "codebook.npz"
BLOCK_IMAGES = 4096  # images whose keys are computed at once


@dataclasses.dataclass(frozen=True)
class StoreSettings(ShardSettings):
    """What decides a store's content; ``manifest.json`` holds these fields and its files.

    Attributes, beside those of every folder of shards:
      code_dim: C.
      keys: kinds of key that can be had, of ``KEY_KINDS``.
      captions: are the images' captions kept?
      command: the command that began the build; a record, never compared.
    """

    code_dim: int
    keys: tuple[str, ...]
    captions: bool = False
    command: str = dataclasses.field(default="", compare=False)
    other_files: ClassVar[tuple[str, ...]] = (CODEBOOK,)

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.keys) - set(KEY_KINDS))
        if unknown or not self.keys:
            raise UserError(f"keys={list(self.keys)}: choose from {', '.join(KEY_KINDS)}")
        if self.codebook_size > 2**16:
            raise UserError(f"a codebook of {self.codebook_size} codes does not fit uint16; at most 65536")
        grid_ops.cells_with_context(*self.grid)

    @property
    def patches_per_image(self) -> int:
        return (self.grid[0] - 1) * (self.grid[1] - 2)

    def shard_files(self, shard: int) -> dict[str, str]:
        """File name of each part ("codes", "sources", "captions" and "latents" if held) of a shard."""
        place = self.place(shard)
        files = {"codes": f"codes-{place}.arrayrecord", "sources": f"sources-{place}.txt"}
        if self.captions:
            files["captions"] = f"captions-{place}.txt"
        if "latent" in self.keys:
            files["latents"] = f"latents-{place}.arrayrecord"
        return files


@dataclasses.dataclass(frozen=True)
class Datastore(ShardFolder):
    """A whole store, opened. Arrays are read on first use and kept; treat them as read-only.

    ``num_images`` is how many images count, the first ones; fewer than stored in a ``subset``.
    """

    settings: StoreSettings

    noun: ClassVar[str] = "datastore"
    format_version: ClassVar[int] = 1
    settings_class: ClassVar[type[ShardSettings]] = StoreSettings
    rebuild: ClassVar[str] = "build it with: python -m arrag_jax.build_datastore --config=… --workdir=…"

    def subset(self, num_images: int) -> "Datastore":
        """The store of the first ``num_images`` images; their row numbers stay the same."""
        if not 1 <= num_images <= self.num_images:
            raise UserError(f"num_images={num_images}: datastore {self.directory} has 1 to {self.num_images}")
        return dataclasses.replace(self, num_images=num_images)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.num_images * self.settings.patches_per_image

    @functools.cached_property
    def codebook(self) -> Float[np.ndarray, "V C"]:
        """Rows of unit norm, float32."""
        with np.load(self.directory / CODEBOOK, allow_pickle=False) as file:
            return file["codebook"]

    @functools.cached_property
    def codes(self) -> UInt16[np.ndarray, "n H W"]:
        """Code grids of all images."""
        return self._read("codes", "<u2").reshape(self.num_images, *self.settings.grid)

    @functools.cached_property
    def latents(self) -> Float[np.ndarray, "n H W C"]:
        """Unit-norm encoder outputs before quantisation, float16."""
        self._require_kind("latent")
        return self._read("latents", "<f2").reshape(self.num_images, *self.settings.grid, self.settings.code_dim)

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
            raise UserError(f"datastore {self.directory} holds no captions; build one with --config.captions=True")
        return self._lines("captions")

    def keys(self, kind: str) -> Float[np.ndarray, "N E"]:
        """Keys of every stored patch, float32, in stored-row order; four parts of unit norm each.

        Args:
          kind: "codebook" or "latent"; the store must hold it.
        """
        self._require_kind(kind)
        keys = np.empty((self.num_patches, 4 * self.settings.code_dim), np.float32)
        step = self.settings.patches_per_image
        for first in range(0, self.num_images, BLOCK_IMAGES):
            images = slice(first, min(first + BLOCK_IMAGES, self.num_images))
            vectors = self.codebook[self.codes[images]] if kind == "codebook" else unit_norm(self.latents[images])
            keys[images.start * step : images.stop * step] = keys_of_maps(vectors)
        return keys

    @functools.cached_property
    def values(self) -> Int[np.ndarray, " N"]:
        """The code that each stored patch offers, int32."""
        return grid_ops.next_codes_of_grids(self.codes.astype(np.int32)).reshape(-1)

    def _require_kind(self, kind: str) -> None:
        if kind not in self.settings.keys:
            held = ", ".join(self.settings.keys)
            raise UserError(f"datastore {self.directory} holds keys of kind {held}, not {kind!r}; {self.rebuild}")

    def _lines(self, part: str) -> list[str]:
        """All lines of a part, one an image."""
        lines = []
        for shard in self._shards():
            lines += (self.directory / self.settings.shard_files(shard)[part]).read_text("utf-8").split("\n")[:-1]
        return lines[: self.num_images]

    def _shards(self) -> range:
        return range(-(-self.num_images // self.settings.shard_size))

    def _read(self, part: str, dtype: str) -> np.ndarray:
        """All records of a part, flat."""
        records: list[bytes] = []
        for shard in self._shards():
            path = self.directory / self.settings.shard_files(shard)[part]
            reader = ArrayRecordReader(str(path))
            found = reader.read_all()
            reader.close()
            expected = len(self.settings.shard_images(shard))
            if len(found) != expected:
                raise UserError(f"{path} holds {len(found)} images, not {expected}; {self.rebuild}")
            records += found
        return np.frombuffer(b"".join(records[: self.num_images]), dtype)


def unit_norm(vectors: Float[np.ndarray, "*dims C"]) -> Float[np.ndarray, "*dims C"]:
    """Rows scaled to length 1, float32; a zero row stays zero."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def keys_of_maps(vectors: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "BM E"]:
    """Keys of maps of cell vectors: the four context cells' vectors side by side, stored-row order."""
    batch, height, width, dim = vectors.shape
    cells = grid_ops.context_cells(height, width)[grid_ops.cells_with_context(height, width)]
    return vectors.reshape(batch, height * width, dim)[:, cells].reshape(-1, 4 * dim)
