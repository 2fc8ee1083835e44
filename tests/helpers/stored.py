"""A small datastore on disk, of the codes that a ``tiny`` model draws."""

from collections import Counter
from typing import Any

import numpy as np

from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.keys.context import unit_norm
from arrag_jax.store import writer
from arrag_jax.store.datastore import Datastore, StoreSettings
from arrag_jax.store.encoding import Encode, EncodedImages
from helpers import tiny

GRID, CODES, IMAGES = tiny.CONFIG.grid, tiny.CONFIG.vision.codebook_size, 12


class StoredImages:
    """Pictures whose first pixels are their codes."""

    def __init__(self, codes: np.ndarray, captions: list[str] | None):
        self.codes, self.captions = codes, captions

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> dict:
        image = np.zeros((*GRID, 3), np.uint8)
        image[..., 0] = self.codes[i]
        return {"image": image} | ({} if self.captions is None else {"caption": self.captions[i].encode()})


def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes from the pixels, latents that no two cells share."""
    codes = images[..., 0].astype(np.int32)
    noise = np.random.default_rng(codes.sum()).normal(size=(*codes.shape, 8))
    return codes, noise.astype(np.float32)


def one_cell_off(encode: Encode) -> Encode:
    """A tokenizer's answers with another code in the cell of the second row and third column."""

    def changed(images: np.ndarray) -> tuple[np.ndarray, Any]:
        codes, latents = encode(images)
        codes = np.array(codes)
        codes[:, 1, 2] = (codes[:, 1, 2] + 1) % CODES
        return codes, latents

    return changed


def build(
    folder, captions: list[str] | None = None, kept: bool = False, shard_size: int = 4, fingerprint: str = "f"
) -> Datastore:
    """A store of ``IMAGES`` pictures, or one a caption, with keys of both kinds; ``kept``: and with its captions."""
    rng = np.random.default_rng(0)
    number = IMAGES if captions is None else len(captions)
    codes, codebook = rng.integers(0, CODES, (number, *GRID)), unit_norm(np.asarray(tiny.janus().codebook))
    settings = StoreSettings(
        fingerprint=fingerprint, grid=GRID, codebook_size=CODES, code_dim=8, keys=("codebook", "latent"), captions=kept,
        num_images=number, shard_size=shard_size, source="pictures", split="all",
    )  # fmt: skip
    return writer.build_datastore(folder, encoded(StoredImages(codes, captions), "pictures"), codebook, settings)


def encoded(pictures: StoredImages, source: str) -> EncodedImages:
    """The pictures, and what ``encode`` makes of them."""
    return EncodedImages(pictures, f"{source}/all/{{}}".format, encode, 3)


def keys_of_maps(vectors: np.ndarray) -> np.ndarray:
    """Keys of maps of cell vectors [B, H, W, C]: the four context cells' vectors side by side, stored-row order."""
    batch, height, width, dim = vectors.shape
    positions = grid_ops.context_positions(height, width)[grid_ops.positions_with_context(height, width)]
    return vectors.reshape(batch, height * width, dim)[:, positions].reshape(-1, 4 * dim)


def keys_of(store: Datastore, kind: str) -> np.ndarray:
    """Keys of every stored patch in stored-row order, [N, E], as searches make them bit by bit."""
    return keys_of_maps(store.codebook[store.codes] if kind == "codebook" else unit_norm(store.records("latents")))


def values_of(store: Datastore) -> np.ndarray:
    """The code that each stored patch offers, int32 [N]."""
    return grid_ops.next_codes_of_grids(store.codes.astype(np.int32)).reshape(-1)


def assert_nearest(example: dict, store: Datastore, own: int) -> None:
    """An image of a neighbour set has what brute force finds, up to ties, among all stored images but ``own``.

    Also left out are those of the same codes.
    """
    codes = example["codes"].reshape(store.settings.grid)
    others = [i for i, grid in enumerate(store.codes) if i != own and (grid != codes).any()]
    book, stored = store.codebook.astype(np.float64), store.codes[others]
    keys = book[grid_ops.contexts_of_grids(stored)].reshape(-1, 4 * book.shape[1])
    values = grid_ops.next_codes_of_grids(stored.astype(np.int32)).reshape(-1)
    positions = grid_ops.positions_with_context(*codes.shape)
    for context, found in zip(grid_ops.contexts_of_grids(codes[None])[0], example["neighbors"][positions], strict=True):
        away = ((keys - book[context].reshape(-1)) ** 2).sum(1)
        farthest = np.sort(away)[len(found) - 1]
        nearer, tied = Counter(values[away < farthest - 1e-5]), Counter(values[abs(away - farthest) <= 1e-5])
        assert nearer <= Counter(found) <= nearer + tied
