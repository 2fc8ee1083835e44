"""Builds a datastore shard by shard: stop it at any moment, run it again, and the bytes are the same.

A shard's files appear whole (``files.whole_file``), the manifest last. ``building.json`` holds the
settings of an unfinished build, so that one with other settings never mixes with it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float
from tqdm import tqdm

from arrag_jax.errors import UserError
from arrag_jax.retrieval.datastore import (
    FORMAT_VERSION,
    MANIFEST,
    Datastore,
    StoreSettings,
    settings_from_json,
    unit_norm,
)
from arrag_jax.retrieval.files import explained, only_writer, sha256_of, whole_file, write_json

BUILDING = "building.json"
READERS = 8  # threads that decode images ahead of the encoder
# Records are small and grouped: with them one by one ArrayRecord adds 20 % to a 12 x 12 grid, so 2 %.
# It also adds 128 KiB a file, 3 % of 16,384 such grids.
RECORD_OPTIONS = "group_size:512,uncompressed"


@runtime_checkable
class Images(Protocol):
    """A random-access source of uint8 [h, w, 3] images, all of one size; read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


# uint8 [B, h, w, 3] → (int [B, H, W] codes, float [B, H, W, C] encoder outputs before quantisation)
Encode = Callable[[np.ndarray], tuple[Any, Any]]


def build(
    directory: str | Path,
    images: Images,
    encode: Encode,
    codebook: Float[np.ndarray, "V C"],
    settings: StoreSettings,
    batch_size: int,
    source_id: Callable[[int], str] | None = None,
) -> Datastore:
    """Builds the store in ``directory``, or goes on with it, or finds it whole.

    Args:
      directory: made if absent.
      images: at least ``settings.num_images``; the first ones are taken.
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
    if len(images) < settings.num_images:
        raise UserError(
            f"{settings.num_images} images asked of {settings.source}/{settings.split}: it has {len(images)}"
        )
    if codebook.shape != (settings.codebook_size, settings.code_dim):
        raise UserError(f"codebook {codebook.shape} is not {(settings.codebook_size, settings.code_dim)}")
    if not np.allclose(np.linalg.norm(codebook, axis=1), 1, atol=1e-4):
        raise UserError("the codebook's rows are not of unit norm; normalise them")
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    source_id = source_id or (lambda i: f"{settings.source}/{settings.split}/{i}")
    with only_writer(directory):
        if require_same_settings(directory, settings) != "whole":
            settings = _begin(directory, settings, codebook)
            _write_shards(directory, images, encode, settings, batch_size, source_id)
            _finish(directory, settings)
        (directory / BUILDING).unlink(missing_ok=True)
    return Datastore.open(directory)


def require_same_settings(directory: Path, settings: StoreSettings) -> str:
    """What lies in the directory: "nothing", "begun" or "whole".

    Raises:
      UserError: a store or an unfinished build of other settings, or other files.
    """
    if (directory / MANIFEST).exists():
        state, found = "whole", Datastore.open(directory).settings
    elif (directory / BUILDING).exists():
        state, found = "begun", _read_building(directory)
    else:
        # a kill before building.json was renamed may leave its temporary file
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise UserError(f"{directory} holds other files and no datastore; choose an empty --workdir")
        return "nothing"
    fields = [field.name for field in dataclasses.fields(settings) if field.compare]
    differ = [
        f"{x}: {getattr(found, x)!r}, not {getattr(settings, x)!r}"
        for x in fields
        if getattr(found, x) != getattr(settings, x)
    ]
    if differ:
        raise UserError(
            f"{directory} holds a datastore of other settings ({'; '.join(differ)}); choose another --workdir"
        )
    return state


def _begin(directory: Path, settings: StoreSettings, codebook: np.ndarray) -> StoreSettings:
    """Writes the settings and the codebook; returns the settings that the build began with."""
    path = directory / BUILDING
    if path.exists():
        settings = _read_building(directory)
    else:
        write_json(path, dataclasses.asdict(settings))
    with whole_file(directory / "codebook.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, codebook=np.asarray(codebook, np.float32))
    return settings


def _read_building(directory: Path) -> StoreSettings:
    try:
        return settings_from_json(json.loads((directory / BUILDING).read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{directory / BUILDING} is damaged ({error!r}); choose another --workdir") from error


def _write_shards(
    directory: Path,
    images: Images,
    encode: Encode,
    settings: StoreSettings,
    batch_size: int,
    source_id: Callable[[int], str],
) -> None:
    """Encodes and writes every shard that is not there yet."""
    missing = [
        shard
        for shard in range(settings.num_shards)
        if not all((directory / name).exists() for name in settings.shard_files(shard).values())
    ]
    left = sum(len(settings.shard_images(shard)) for shard in missing)
    with tqdm(
        total=settings.num_images, initial=settings.num_images - left, unit="image", desc="encoding", dynamic_ncols=True
    ) as bar:
        for shard in missing:
            numbers = settings.shard_images(shard)
            codes, latents = [], []
            for count, batch in _batches(images, numbers, batch_size):
                batch_codes, batch_latents = encode(batch)
                codes.append(_checked_codes(np.asarray(batch_codes)[:count], settings))
                if "latent" in settings.keys:
                    latents.append(unit_norm(np.asarray(batch_latents)[:count]).astype("<f2"))
                bar.update(count)
            files = settings.shard_files(shard)
            write_records(directory / files["codes"], np.concatenate(codes))
            if "latent" in settings.keys:
                write_records(directory / files["latents"], np.concatenate(latents))
            with whole_file(directory / files["sources"]) as temporary:
                temporary.write_text("".join(f"{source_id(i)}\n" for i in numbers), encoding="utf-8")


def _batches(images: Images, numbers: range, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(images that count, batch padded with zeros) in order; the next batch is read while this one is used."""
    with ThreadPoolExecutor(READERS) as pool:
        parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        ahead = [pool.submit(images.__getitem__, i) for i in parts[0]]
        for here, following in zip(parts, [*parts[1:], range(0)], strict=True):
            batch = np.stack([read.result() for read in ahead])
            ahead = [pool.submit(images.__getitem__, i) for i in following]
            yield len(here), np.pad(batch, ((0, batch_size - len(here)), (0, 0), (0, 0), (0, 0)))


def _checked_codes(codes: np.ndarray, settings: StoreSettings) -> np.ndarray:
    if codes.shape[1:] != settings.grid:
        raise UserError(f"the tokenizer gives grids {codes.shape[1:]}, the datastore has {settings.grid}")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise UserError(
            f"the tokenizer gave codes from {codes.min()} to {codes.max()}; its codebook has {settings.codebook_size}"
        )
    return codes.astype("<u2")


def write_records(path: Path, arrays: np.ndarray) -> None:
    """One ArrayRecord file with one record a row."""
    with whole_file(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), RECORD_OPTIONS)
        for array in arrays:
            writer.write(array.tobytes())
        writer.close()


def _finish(directory: Path, settings: StoreSettings) -> None:
    """Hashes every file and writes the manifest, which makes the store whole."""
    names = [name for shard in range(settings.num_shards) for name in settings.shard_files(shard).values()]
    counts = [
        len(settings.shard_images(shard)) for shard in range(settings.num_shards) for _ in settings.shard_files(shard)
    ]
    files = {}
    for name, count in zip(["codebook.npz", *names], [0, *counts], strict=True):
        path = directory / name
        files[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size, "images": count}
    patches = settings.num_images * settings.patches_per_image
    write_json(
        directory / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "settings": dataclasses.asdict(settings),
            "num_patches": patches,
            "files": files,
        },
    )
