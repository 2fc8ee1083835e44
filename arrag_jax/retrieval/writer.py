"""Builds a datastore shard by shard (``shards.build``)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from arrag_jax.errors import UserError
from arrag_jax.files import whole_file
from arrag_jax.retrieval import shards
from arrag_jax.retrieval.datastore import CODEBOOK, Datastore, StoreSettings, unit_norm
from arrag_jax.retrieval.encoding import Encode, Example, Examples, encoded, require_images

# Records are small and grouped: with them one by one ArrayRecord adds 20 % to a 12 x 12 grid, so 2 %.
# It also adds 128 KiB a file, 3 % of 16,384 such grids.
RECORD_OPTIONS = "group_size:512,uncompressed"


def build(
    directory: str | Path,
    examples: Examples,
    encode: Encode,
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    batch_size: int,
    source_id: Callable[[int], str] | None = None,
) -> Datastore:
    """Builds the store in ``directory``, or goes on with it, or finds it whole.

    Args:
      directory: made if absent.
      examples: at least ``settings.num_images``; the first ones are taken.
      encode: called with batches of exactly ``batch_size`` (a shard's last one is padded with zeros).
      codebook: rows of unit norm.
      settings: what to build.
      batch_size: images a call of ``encode``.
      source_id: image number → one line that tells where it came from; default "source/split/number".

    Raises:
      UserError: too few images, another store or build in the directory (nothing is touched), a code
        outside the codebook, or a disk that is full.
    """
    directory = Path(directory)
    require_images(examples, settings)
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")
    source_id = source_id or (lambda i: f"{settings.source}/{settings.split}/{i}")

    def write_codebook() -> None:
        with whole_file(directory / CODEBOOK) as temporary, open(temporary, "wb") as file:
            np.savez(file, codebook=np.asarray(codebook, np.float32))

    def write_shard(shard: int, bar: tqdm) -> None:
        numbers, files = settings.shard_images(shard), settings.shard_files(shard)
        code_records, latent_records, captions = [], [], []
        for batch, codes, latents in encoded(examples, numbers, encode, batch_size, settings):
            code_records += [grid.tobytes() for grid in codes]
            if "captions" in files:
                captions += [caption_of(example) for example in batch]
            if "latents" in files:
                latent_records += [grid.tobytes() for grid in unit_norm(latents).astype("<f2")]
            bar.update(len(batch))
        shards.write_records(directory / files["codes"], code_records, RECORD_OPTIONS)
        if "latents" in files:
            shards.write_records(directory / files["latents"], latent_records, RECORD_OPTIONS)
        if "captions" in files:
            write_lines(directory / files["captions"], captions)
        write_lines(directory / files["sources"], [source_id(i) for i in numbers])

    return shards.build(Datastore, directory, settings, write_shard, write_codebook)


def caption_of(example: Example) -> str:
    """An example's caption in one line.

    Raises:
      UserError: it has none.
    """
    if "caption" not in example:
        raise UserError("these images have no captions; leave config.captions out")
    caption = example["caption"]
    return " ".join((caption.decode() if isinstance(caption, bytes) else caption).split())


def write_lines(path: Path, lines: list[str]) -> None:
    """A text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
