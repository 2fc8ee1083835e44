"""The same photos as a folder, a tar, Parquet files and the three outputs of img2dataset."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from arrag_jax.data.emoji.scenes import render, scene

Photos = list[tuple[str, bytes, str]]  # name, bytes of a JPEG or PNG, caption


def scenes(number: int) -> Photos:
    """Scenes as PNG files."""
    return [(f"{i:09d}", png(render(scene("store", i))), f"scene number {i}") for i in range(number)]


def png(pixels: np.ndarray, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def write_folder(folder: Path, photos: Photos, ending: str = "png") -> Path:
    """A file per photo with its caption beside it."""
    folder.mkdir(parents=True)
    for name, data, caption in photos:
        (folder / f"{name}.{ending}").write_bytes(data)
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    return folder


def write_tar(path: Path, photos: Photos, ending: str = "png") -> Path:
    """A webdataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data, caption in photos:
            for suffix, content in ((ending, data), ("txt", caption.encode())):
                if content:
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def write(path: Path, columns: dict[str, Any], rows: int = 3) -> Path:
    """A Parquet file with so many rows per group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def write_parquet(path: Path, photos: Photos, rows: int = 3) -> Path:
    """A Parquet file as data sets of the hub have them."""
    images = [{"bytes": data, "path": f"{name}.png"} for name, data, _ in photos]
    return write(path, {"image": images, "text": [caption for _, _, caption in photos]}, rows)


def img2dataset(folder: Path, photos: Photos, failed: int, kind: str, words: bool = True) -> Path:
    """What img2dataset writes of these photos and of some that it could not download: "files", "tar" or "parquet".

    words: whether captions are in files of their own, too.
    """
    keys = [name for name, _, _ in photos] + [f"{10**8 + i:09d}" for i in range(failed)]
    facts = {
        "url": [f"http://host/{key}" for key in keys],
        "caption": [caption for _, _, caption in photos] + ["gone"] * failed,
        "key": keys,
        "status": ["success"] * len(photos) + ["failed_to_download"] * failed,
        "error_message": pa.array([None] * len(photos) + ["HTTP Error 404"] * failed),
    }
    kept = [(name, data, caption if words else "") for name, data, caption in photos]
    if kind == "files":
        write_folder(folder / "00000", kept)
        for number, key in enumerate(keys[: len(photos)] if words else []):
            told = {name: values[number] for name, values in facts.items() if name != "error_message"}
            (folder / "00000" / f"{key}.json").write_text(json.dumps(told))
    elif kind == "tar":
        write_tar(folder / "00000.tar", kept)
    else:
        facts["jpg"] = [data for _, data, _ in photos] + [None] * failed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000_stats.json").write_text("{}")
    write(folder / "00000.parquet", facts)
    return folder
