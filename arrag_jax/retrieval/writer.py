"""Builds a datastore shard by shard (``building.build``), without the images that cannot be read."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from arrag_jax.errors import UserError
from arrag_jax.files import whole_file
from arrag_jax.retrieval import building
from arrag_jax.retrieval.datastore import BAD_FILES, CODEBOOK, Datastore, StoreSettings, read_bad, unit_norm
from arrag_jax.retrieval.encoding import BadImage, Encode, Example, Examples, encoded, require_images
from arrag_jax.retrieval.team import Team

# Codes have spare bits (10 to 14 of 16 are in use), which zstd finds; where there are none it adds next to nothing.
# Grouped, for ArrayRecord adds 9 bytes a record else; it adds 128 KiB a file in any case, so that a store stays within
# 5 % of 2 bytes a code from 2.5 MiB of codes on whatever they are, and from 0.3 MiB on if 9 bits of 16 are in use.
RECORD_OPTIONS = "group_size:512,zstd"


class Tally(NamedTuple):
    """Images gone through, and the bad ones among them."""

    images: int
    bad: int


NONE = Tally(0, 0)


def build(
    directory: str | Path,
    examples: Examples,
    encode: Encode,
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    batch_size: int,
    source_id: Callable[[int], str] | None = None,
    max_bad_fraction: float = 0.0,
    team: Team | None = None,
    others: Tally = NONE,
) -> Datastore:
    """Builds the store in ``directory``, or goes on with it, or finds it whole.

    Args:
      directory: made if absent.
      examples: at least ``settings.num_images`` (any, if the store is whole); the first ones are taken.
      encode: called with batches of exactly ``batch_size`` (a shard's last one is padded with zeros).
      codebook: rows of unit norm.
      settings: what to build.
      batch_size: images a call of ``encode``.
      source_id: image number → one line that tells where it came from; default "source/split/number".
      max_bad_fraction: share of bad images above which the build fails.
      team: the processes that build it together; None = this one alone.
      others: images of the store that this one is to be a part of; they count in the share of bad ones.

    Raises:
      UserError: too few images or too many bad ones, a code outside the codebook; else as ``building.build``.
    """
    directory = Path(directory)
    if building.require_same_settings(Datastore, directory, settings) != "whole":
        require_images(examples, settings)
    _require_codebook(codebook, settings)
    source_id = source_id or (lambda i: f"{settings.source}/{settings.split}/{i}")

    def write_codebook() -> None:
        with whole_file(directory / CODEBOOK) as temporary, open(temporary, "wb") as file:
            np.savez(file, codebook=np.asarray(codebook, np.float32))

    require_few_bad = functools.partial(_require_few_bad, directory, settings.num_images, others, max_bad_fraction)

    def write_shard(shard: int, bar: tqdm) -> None:
        (directory / settings.bad_file(shard)).unlink(missing_ok=True)  # of a killed run: it may be readable by now
        bad: dict[int, str] = {}

        def skip(number: int, reason: BadImage) -> None:
            bad[number] = f"{source_id(number)}\t{reason}"
            bar.write(f"skipped {source_id(number)}: {reason}", file=sys.stderr)
            bar.update()

        numbers = settings.shard_images(shard)
        batches = encoded(examples, numbers, encode, batch_size, settings, skip)
        _write_records(directory, settings.shard_files(shard), batches, bar)
        if bad:  # before the last file, with which the shard is done
            _write_lines(directory / settings.bad_file(shard), list(bad.values()))
        good = [source_id(number) for number in numbers if number not in bad]
        _write_lines(directory / settings.shard_files(shard)["sources"], good)
        require_few_bad()

    return building.build(Datastore, directory, settings, write_shard, write_codebook, require_few_bad, team)


def _require_codebook(codebook: np.ndarray, settings: StoreSettings) -> None:
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")


def _write_records(directory: Path, files: dict[str, str], batches: Iterator, bar: tqdm) -> None:
    """Writes a shard's codes and, if it holds them, latents and captions."""
    code_records, latent_records, captions = [], [], []
    for batch, codes, latents in batches:
        code_records += [grid.tobytes() for grid in codes]
        if "latents" in files:
            latent_records += [grid.tobytes() for grid in unit_norm(latents).astype("<f2")]
        if "captions" in files:
            captions += [caption_of(example) for example in batch]
        bar.update(len(batch))
    building.write_records(directory / files["codes"], code_records, RECORD_OPTIONS)
    if "latents" in files:
        building.write_records(directory / files["latents"], latent_records, RECORD_OPTIONS)
    if "captions" in files:
        _write_lines(directory / files["captions"], captions)


def caption_of(example: Example) -> str:
    """An example's caption in one line.

    Raises:
      UserError: it has none.
    """
    if "caption" not in example:
        raise UserError("these images have no captions; leave config.captions out")
    caption = example["caption"]
    return " ".join((caption.decode() if isinstance(caption, bytes) else caption).split())


def _write_lines(path: Path, lines: list[str]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _require_few_bad(directory: Path, num_images: int, others: Tally, max_bad_fraction: float) -> None:
    """Raises UserError if too large a share of all images, with those of the other parts, is known to be bad."""
    bad = [line for path in sorted(directory.glob(BAD_FILES)) for line in read_bad(path)]
    found, total = len(bad) + others.bad, num_images + others.images
    first = "; ".join(f"{name}: {reason}" for name, reason in bad[:3]) + (" …" if len(bad) > 3 else "")
    if found == total:
        raise UserError(f"none of the {total:,} images can be read ({first}); is config.source right?")
    if found > max_bad_fraction * total:
        raise UserError(
            f"{found:,} of {total:,} images cannot be read ({first}), more than config.max_bad_fraction="
            f"{max_bad_fraction:g} allows; raise it, or mend them, delete {directory} and run the same command again"
        )
