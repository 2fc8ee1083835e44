"""Measures how long the search for copies of stored images takes, of random codes of which a tenth are planted copies.

python benchmarks/copies.py [--images=2212] [--stored=20000] [--side=24] [--codes=16384]
"""

import time

import numpy as np
from absl import app, flags

from arrag_jax.errors import run_command
from arrag_jax.evaluation.copy_audit import CHUNK, copies_of
from arrag_jax.evaluation.memorization import moved
from arrag_jax.evaluation.nearest_stored import nearest_stored

IMAGES = flags.DEFINE_integer("images", 2212, "images that are looked at")
STORED = flags.DEFINE_integer("stored", 20000, "stored images")
SIDE = flags.DEFINE_integer("side", 24, "sides of the code grids")
CODES = flags.DEFINE_integer("codes", 16384, "size of the codebook")


def main(_: list[str]) -> None:
    """Prints the seconds, and how many planted copies were found."""
    rng, side = np.random.default_rng(0), SIDE.value
    stored = rng.integers(0, CODES.value, (STORED.value, side, side), dtype=np.uint16)
    images = rng.integers(0, CODES.value, (IMAGES.value, side, side))
    planted = IMAGES.value // 10
    for number in range(planted):
        there = moved(stored[number % STORED.value], *map(int, rng.integers(-side // 4, side // 4 + 1, 2)))
        images[number] = np.where(there >= 0, there, images[number])
    start, cpu = time.perf_counter(), time.process_time()
    found = nearest_stored(images, (stored[i : i + CHUNK] for i in range(0, STORED.value, CHUNK)))
    seconds, of_cpu = time.perf_counter() - start, time.process_time() - cpu
    copies = int(copies_of(found)[1].sum())
    print(f"{seconds:.1f} s, {of_cpu:.1f} s of CPU time; {copies} copies found, {planted} planted")


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
