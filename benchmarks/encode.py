"""Compares the images per second of a whole datastore build with those of the encoder alone.

python benchmarks/encode.py [--source=DIR] [--images=4096] [--rounds=3]

Without --source, a folder of scenes is written, one PNG file per scene. "encoder" is the compiled encoder on images
in memory, batch after batch. "build" is `build_datastore` without an index, from listing the folder to writing the
manifest, with the encoder already compiled. "reading" is only the decoding of the source, in as many threads as a build
uses. In every round all three are timed one after another in one process; the table has medians over rounds.
"""

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from arrag_jax.config import DatastoreConfig
from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.data.sources import FileImages, list_images, root_of
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.store.encoding import READERS
from arrag_jax.store.from_images import build
from arrag_jax.store.images import encoder
from arrag_jax.store.workers import workers_in

SOURCE = flags.DEFINE_string("source", "", "folder or tar of images; default: scenes")
MODEL = flags.DEFINE_string(
    "model", str(Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"), "checkpoint folder"
)
IMAGES = flags.DEFINE_integer("images", 4096, "how many of them")
BATCH = flags.DEFINE_integer("batch_size", 64, "images a batch")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timings of each; the median is printed")


def main(_: list[str]) -> None:
    """Prints the table."""
    tokenizer = load_tokenizer(MODEL.value)
    rates: dict[str, list[float]] = {"encoder": [], "build": [], "reading": []}
    with tempfile.TemporaryDirectory() as folder:
        source = SOURCE.value or str(write_scenes(Path(folder) / "scenes"))
        images = FileImages(root_of(source), list_images(source)[: IMAGES.value], tokenizer.image_size)
        config = DatastoreConfig(
            MODEL.value, source, num_images=len(images), batch_size=BATCH.value, max_bad_fraction=0.5, indexes=()
        )
        batch, encode = np.stack([images[i]["image"] for i in range(BATCH.value)]), encoder(tokenizer)
        jax.block_until_ready([encode(batch) for _ in jax.local_devices()])  # compiles
        for turn in range(ROUNDS.value):
            rates["encoder"].append(rate(len(images), lambda: encode_all(encode, batch, len(images))))
            with workers_in(folder) as workers:
                store = Path(folder) / f"store_{turn}"
                rates["build"].append(rate(len(images), lambda: build(config, store, tokenizer, workers)))  # noqa: B023
            rates["reading"].append(rate(len(images), lambda: read_all(images)))
    rows = [
        [name, statistics.median(found), statistics.median(x / y for x, y in zip(found, rates["encoder"], strict=True))]
        for name, found in rates.items()
    ]
    devices = f"{jax.local_device_count()} device of kind {jax.devices()[0].device_kind}"
    print(f"{devices}, {len(images):,} images, batches of {BATCH.value}, median of {ROUNDS.value}")
    print(table(["", "images/s", "of encoder"], rows))


def write_scenes(folder: Path) -> Path:
    """Writes scenes of the store split as PNG files; returns the folder."""
    folder.mkdir()
    for number in range(IMAGES.value):
        Image.fromarray(render(scene("store", number))).save(folder / f"{number:06d}.png")
    return folder


def rate(images: int, work) -> float:
    """Returns the images per second of ``work``."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def encode_all(encode, batch: np.ndarray, images: int) -> None:
    """Encodes ``batch`` repeatedly, as often as ``images`` fill it, and fetches all results.

    One more batch than there are devices is queued, so that no device waits.
    """
    waiting = []
    for _ in range(0, images, len(batch)):
        waiting.append(encode(batch))
        if len(waiting) > jax.local_device_count():
            jax.device_get(waiting.pop(0))
    jax.device_get(waiting)


def read_all(images: FileImages) -> None:
    """Decodes every image and drops it."""
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(images.__getitem__, range(len(images))):
            pass


if __name__ == "__main__":
    app.run(main)
