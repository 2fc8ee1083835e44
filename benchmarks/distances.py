"""Measures the FID network beside PyTorch's, in turn on the same pixels, and the time of each distance.

python benchmarks/distances.py [--images=64] [--batch=32] [--rounds=3] [--side=384] [--sets=2000]

PyTorch runs the module of the package that holds the weights, with channels first and with channels last; it is a
development requirement. Rates are medians over rounds, in each of which every network runs once over all images, and
ratios are medians of the rounds' ratios. "scaled and read" is what a run does: images of --side pixels are scaled by
the rule "clean" while the network computes. The second table gives seconds per distance of random features of --sets
images each, and of FWD of images of 64 x 64 pixels.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from arrag_jax.errors import run_command
from arrag_jax.evaluation.metrics import cmmd, frechet_distance, fwd, kernel_distance, precision_recall
from arrag_jax.evaluation.metrics.features import inception_extractor, stream
from arrag_jax.evaluation.metrics.moments import Moments
from arrag_jax.figures.grids import table
from arrag_jax.models.inception import installed

IMAGES = flags.DEFINE_integer("images", 64, "images per round")
BATCH = flags.DEFINE_integer("batch", 32, "images per call of a network")
ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds")
SIDE = flags.DEFINE_integer("side", 384, "sides of the images that are scaled")
SETS = flags.DEFINE_integer("sets", 2000, "images in each set of features")


def networks() -> tuple[dict[str, Callable[[], object]], float]:
    """Returns functions that each run one network over all images, and the largest difference of their features."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES.value, SIDE.value, SIDE.value, 3), dtype=np.uint8)
    extractor = inception_extractor()
    pixels = np.stack([extractor.prepare(image) for image in images])
    batches = [pixels[i : i + BATCH.value] for i in range(0, len(pixels), BATCH.value)]
    module = torch.jit.load(installed()).eval()
    first = [torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous() for batch in batches]
    last = [batch.contiguous(memory_format=torch.channels_last) for batch in first]

    def theirs(inputs):
        with torch.no_grad():
            return np.concatenate([module(batch).numpy() for batch in inputs])

    runs: dict[str, Callable[[], object]] = {
        "this network": lambda: np.concatenate([np.asarray(extractor.embed(batch)) for batch in batches]),
        "PyTorch, channels first": lambda: theirs(first),
        "PyTorch, channels last": lambda: theirs(last),
        "this network, scaled and read": lambda: list(stream(extractor.embed, extractor.prepare, images, BATCH.value)),
    }
    found = [np.asarray(runs[name]()) for name in ("this network", "PyTorch, channels first")]
    return runs, float(np.abs(found[0] - found[1]).max())


def seconds(work: Callable[[], object]) -> float:
    """Returns the seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def distances() -> list[list[object]]:
    """Returns a row per distance: its name and its seconds."""
    rng = np.random.default_rng(0)
    wide = [rng.normal(size=(SETS.value, 2048)).astype(np.float32) for _ in range(2)]
    narrow = [x[:, :768] / np.linalg.norm(x[:, :768], axis=1, keepdims=True) for x in wide]
    images = [rng.integers(0, 256, (SETS.value, 64, 64, 3), dtype=np.uint8) for _ in range(2)]
    works = {
        "moments of 2048 features": lambda: Moments.empty(2048).add(wide[0]),
        "FID": lambda: frechet_distance(*wide),
        "KID, full sets": lambda: kernel_distance(*wide),
        "precision, recall, density, coverage": lambda: precision_recall(*wide),
        "CMMD of 768 features": lambda: cmmd(*narrow),
        "FWD of 64 x 64": lambda: fwd(*images),
    }
    return [[name, seconds(work)] for name, work in works.items()]


def main(_: list[str]) -> None:
    """Prints both tables."""
    runs, difference = networks()
    for run in runs.values():
        run()  # compiles, and lets PyTorch profile its module
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS.value):
        for name, run in runs.items():
            rates[name].append(IMAGES.value / seconds(run))
    rows = []
    for name, found in rates.items():
        ratios = [x / y for x, y in zip(found, rates["PyTorch, channels first"], strict=True)]
        rows.append([name, statistics.median(found), statistics.median(ratios)])
    print(
        f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, {IMAGES.value} images in batches of "
        f"{BATCH.value}, median of {ROUNDS.value}; features differ by at most {difference:.1e}"
    )
    print(table(["", "images/s", "of PyTorch"], rows))
    print(f"\n{table([f'{SETS.value:,} images each', 'seconds'], distances())}")
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB in use")


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
