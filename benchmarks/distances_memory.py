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
from arrag_jax.interfaces import Prompt

IMAGES = flags.DEFINE_integer("images", 30_000, "drawn images, and true ones")
FWD_IMAGES = flags.DEFINE_integer("fwd_images", 2_000, "drawn images of FWD, and true ones")
SIDE = flags.DEFINE_integer("side", 384, "sides of the images")
GIB = 2**20  # of the kilobytes that Linux counts in


def gib(name: str) -> float:
    """Returns a number of /proc/self/status, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / GIB


def tell(name: str, loaded: float, work: Callable[[], object]) -> None:
    """Prints by how much the memory that the process holds exceeds ``loaded`` GiB, at most, while it works."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    work()
    seconds, most = time.perf_counter() - start, gib("VmHWM")
    print(f"{name}: at most {most - loaded:.2f} GiB beyond that, in {seconds:.0f} s", flush=True)


def make_images(folder: Path, seed: int) -> Path:
    """Writes smooth random images, and links the names of all images to them; returns the folder of the links."""
    rng, count = np.random.default_rng(seed), min(SHARD, IMAGES.value)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        small.resize((SIDE.value, SIDE.value), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    for number in range(IMAGES.value):
        os.link(folder / f"{number % count}.png", folder / "images" / f"{number:06d}.png")
    return folder / "images"


def main(_: list[str]) -> None:
    """Prints what the process holds after the network has seen a batch, and both peaks."""
    prompts = [Prompt(f"{number:06d}", "an image") for number in range(IMAGES.value)]
    with TemporaryDirectory() as scratch:
        drawn, true = (make_images(Path(scratch) / name, seed) for seed, name in enumerate(("drawn", "true")))
        benchmark = Distances(prompts, reference=str(true), fwd_level=0, features=str(Path(scratch) / "features"))
        benchmark.protocol()
        inception_features(np.zeros((32, 299, 299, 3), np.uint8))
        loaded, images = gib("VmRSS"), image_files(benchmark)
        cores = len(os.sched_getaffinity(0))
        print(f"{SIDE.value} x {SIDE.value} pixels, {cores} cores; {loaded:.2f} GiB with the network", flush=True)
        tell(f"features and figures, {len(images):,} images each", loaded, lambda: benchmark.measure(drawn, images))
        found = benchmark.true_images()
        assert found is not None  # the reference is a folder
        both = [each.first(FWD_IMAGES.value) for each in (drawn_set(drawn, images), found[0])]
        size = (SIDE.value, SIDE.value)
        name = f"16 packets of FWD, {len(both[0]):,} images each"
        tell(name, loaded, lambda: estimates(*both, size, LEVEL, range(1)))


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
