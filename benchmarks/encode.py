"""Compares the images per second of a whole datastore build with those of the encoder alone.

python benchmarks/encode.py [--source=DIR] [--images=4096] [--rounds=3]
python benchmarks/encode.py --workers=2 [--shard_size=128]

Without --source, a folder of scenes is written, one PNG file per scene. "encoder" is the compiled encoder on images
in memory, batch after batch. "build" is `build_datastore` without an index, from listing the folder to writing the
manifest, with the encoder already compiled. "reading" is only the decoding of the source, in as many threads as a build
uses. In every round all three are timed one after another in one process; the table has medians over rounds.

With --workers, the command is timed instead: in so many processes under ``jax.distributed``, then with --ray=local and
as many workers. The rate is that of the shards after each worker's first, from the times of their files, so that
starting and compiling are left out. "per item" is what the engine takes to hand out an item that needs no work, and to
get its answer.
"""

import os
import socket
import statistics
import subprocess
import sys
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
from arrag_jax.work import open_engine, run_work

SOURCE = flags.DEFINE_string("source", "", "folder or tar of images; default: scenes")
MODEL = flags.DEFINE_string(
    "model", str(Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"), "checkpoint folder"
)
IMAGES = flags.DEFINE_integer("images", 4096, "how many of them")
BATCH = flags.DEFINE_integer("batch_size", 64, "images a batch")
WORKERS = flags.DEFINE_integer("workers", 0, "compare processes with workers on Ray, so many each")
SHARD = flags.DEFINE_integer("shard_size", 128, "images per shard, with --workers")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timings of each; the median is printed")


def main(_: list[str]) -> None:
    """Prints the table."""
    if WORKERS.value:
        compare_engines()
        return
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
            store = Path(folder) / f"store_{turn}"
            rates["build"].append(rate(len(images), lambda: build(config, store, tokenizer)))  # noqa: B023
            rates["reading"].append(rate(len(images), lambda: read_all(images)))
    rows = [
        [name, statistics.median(found), statistics.median(x / y for x, y in zip(found, rates["encoder"], strict=True))]
        for name, found in rates.items()
    ]
    devices = f"{jax.local_device_count()} device of kind {jax.devices()[0].device_kind}"
    print(f"{devices}, {len(images):,} images, batches of {BATCH.value}, median of {ROUNDS.value}")
    print(table(["", "images/s", "of encoder"], rows))


def compare_engines() -> None:
    """Prints the rates of processes and of Ray."""
    rates: dict[str, list[float]] = {"processes": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        source = SOURCE.value or str(write_scenes(Path(folder) / "scenes"))
        for turn in range(ROUNDS.value):
            for name, found in rates.items():
                found.append(rate_of_command(Path(folder) / f"{name}_{turn}", source, name == "ray"))
    with open_engine("local", 1) as engine:
        ended = []
        for _ in run_work(range(1000), Nothing, dict.fromkeys(range(1000), 1), "nothing", engine=engine):
            ended.append(time.perf_counter())
    per_item = (ended[-1] - ended[0]) / (len(ended) - 1)
    rows = [
        [name, statistics.median(x), statistics.median(np.divide(x, rates["processes"]))] for name, x in rates.items()
    ]
    print(f"{WORKERS.value} workers, {IMAGES.value:,} images, shards of {SHARD.value}, median of {ROUNDS.value}")
    print(table(["", "images/s", "of processes"], rows))
    print(f"ray: {1000 * per_item:.2f} ms per item")


class Nothing:
    """A worker that does nothing."""

    def __call__(self, item: int, report: object) -> int:
        return item


def rate_of_command(store: Path, source: str, on_ray: bool) -> float:
    """Returns the images per second of ``build_datastore`` after each worker's first shard."""
    command = [sys.executable, "-m", "arrag_jax.build_datastore", "--config=configs/folder_datastore.py"]
    values = {"model": MODEL.value, "source": source, "num_images": IMAGES.value, "batch_size": BATCH.value}
    values |= {"shard_size": SHARD.value, "indexes": ()}
    command += [*(f"--config.{name}={value}" for name, value in values.items()), f"--workdir={store}"]
    cores = (os.cpu_count() or WORKERS.value) // WORKERS.value
    if on_ray:
        subprocess.run([*command, "--ray=local", f"--ray_cores={cores}"], check=True)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        run = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(WORKERS.value)}
        started = [
            subprocess.Popen(command, env=run | {"JAX_PROCESS_ID": str(number)}) for number in range(WORKERS.value)
        ]
        assert not any([process.wait() for process in started])
    times = sorted(path.stat().st_mtime for path in store.glob("codes-*"))[WORKERS.value - 1 :]
    return SHARD.value * (len(times) - 1) / (times[-1] - times[0])


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
