"""Measures the memory that the benchmark ``distances`` needs beyond its networks.

python benchmarks/distances_memory.py [--images=30000] [--fwd_images=2000] [--side=384]

Drawn and true images are --images files each, links to as many different ones as a file of features holds (128), so
that the FID network sees each of them once, and everything else all of them. The first peak is that of features, FID,
KID, precision and recall of --images images. The second one is that of the first 16 of FWD's 256 packets, of
--fwd_images images; FWD keeps nothing of a packet but its distances, so that its other packets need the same. Peaks are
Linux' (VmHWM), less what the process holds after the network has seen one batch.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import app, flags
from PIL import Image

from arrag_jax.errors import run_command
from arrag_jax.evaluation.distances.benchmark import Distances
from arrag_jax.evaluation.distances.packets import estimates
from arrag_jax.evaluation.drawn_folder import image_files
from arrag_jax.evaluation.feature_store import SHARD
from arrag_jax.evaluation.image_sets import drawn_set
from arrag_jax.evaluation.metrics import inception_features
from arrag_jax.evaluation.metrics.wavelets import LEVEL
from arrag_jax.figures.grids import table
from arrag_jax.interfaces import Prompt

IMAGES = flags.DEFINE_integer("images", 30_000, "drawn images, and true ones")
FWD_IMAGES = flags.DEFINE_integer("fwd_images", 2_000, "drawn images of FWD, and true ones")
SIDE = flags.DEFINE_integer("side", 384, "sides of the images")
GIB = 2**20  # of the kilobytes that Linux counts in


def gib(name: str) -> float:
    """Returns a number of /proc/self/status, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / GIB


def peak(work: Callable[[], object]) -> tuple[float, float]:
    """Returns the peak of the memory that the process holds while it works, in GiB, and the seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    work()
    return gib("VmHWM"), time.perf_counter() - start


def make_images(folder: Path, seed: int) -> None:
    """Writes smooth random images, and links the names of all images to them."""
    rng, count = np.random.default_rng(seed), min(SHARD, IMAGES.value)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        small.resize((SIDE.value, SIDE.value), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    for number in range(IMAGES.value):
        os.link(folder / f"{number % count}.png", folder / "images" / f"{number:06d}.png")


def main(_: list[str]) -> None:
    """Prints what the process holds after the network, and both peaks."""
    prompts = [Prompt(f"{number:06d}", "an image") for number in range(IMAGES.value)]
    with TemporaryDirectory() as scratch:
        drawn, true = Path(scratch) / "drawn", Path(scratch) / "true"
        make_images(drawn, 0)
        make_images(true, 1)
        reference, features = str(true / "images"), str(Path(scratch) / "features")
        benchmark = Distances(prompts, reference=reference, fwd_level=0, features=features)
        benchmark.protocol()
        inception_features(np.zeros((32, 299, 299, 3), np.uint8))
        loaded, images = gib("VmRSS"), image_files(benchmark)
        first = peak(lambda: benchmark.measure(drawn / "images", images))
        found = benchmark.true_images()
        assert found is not None  # the reference is a folder
        both = (drawn_set(drawn / "images", images).first(FWD_IMAGES.value), found[0].first(FWD_IMAGES.value))
        second = peak(lambda: estimates(*both, (SIDE.value, SIDE.value), LEVEL, range(1)))
    names = f"features and figures, {IMAGES.value:,} images each", f"packets of FWD, {len(both[0]):,} images each"
    rows = [[name, most, most - loaded, took] for name, (most, took) in zip(names, (first, second), strict=True)]
    print(
        f"{SIDE.value} x {SIDE.value} pixels, {len(os.sched_getaffinity(0))} cores; {loaded:.2f} GiB with the network"
    )
    print(table(["", "peak GiB", "beyond the network", "seconds"], rows))


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
