"""Measures windows (several positions per pass) and the guard against copies, beside plain drawing.

python benchmarks/parallel.py --store=FOLDER [--windows=4,8,16,32] [--batches=1,4,16] [--rounds=3] [--most=16]

The embedded checkpoint draws test prompts, guidance 1.5 and top-p 0.9; FOLDER is a datastore of its tokenizer
(``configs/emoji_datastore.py``). All variants of a batch take turns in every round, so that slow changes of the machine
affect all of them. The table has, per window and guess: passes per picture, positions per pass, and medians of the
milliseconds per picture and of their ratio to plain drawing in the same round, by the clock and of CPU time (of all
threads), which other programs on the machine change less. Guess "above" is the code above, guess
"stored" reads the window again by what the stored images hold (``retrieval.guesses``). The rows "guard" draw plain with
``max_copied_cells``. The first round compiles and is not counted. All windows' pictures are compared with plain's.
"""

import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from arrag_jax.data.emoji.scenes import scene
from arrag_jax.decode.loop import sample
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.retrieval.stored_codes import StoredCodes
from arrag_jax.store.datastore import Datastore

MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
STORE = flags.DEFINE_string("store", None, "folder of a datastore", required=True)
WINDOWS = flags.DEFINE_list("windows", ["4", "8", "16", "32"], "positions per pass")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "pictures drawn at once")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timings of each variant; the median is printed")
MOST = flags.DEFINE_integer("most", 16, "max_copied_cells of the guard")


def main(_: list[str]) -> None:
    """Prints a table per batch size."""
    model, text, store = load_model(MODEL), PromptTokenizer.load(MODEL), Datastore.open(STORE.value)
    stored, cells = StoredCodes.of(store.codes, model.codebook_size), int(np.prod(model.grid))
    print(f"{jax.devices()[0].device_kind}, {store.num_patches:,} patches")
    variants = {("plain", ""): {}, ("guard", f"{MOST.value}"): {"max_copied_cells": MOST.value, "stored": stored}}
    columns = ["", "guess", "passes", "positions per pass", "ms", "of plain", "CPU ms", "of plain"]
    for window in map(int, WINDOWS.value):
        variants |= {(f"window {window}", name): {"window": window, "stored": images} for name, images in
                     (("above", None), ("stored", stored))}  # fmt: skip
    for batch in map(int, BATCHES.value):
        times: dict = {name: [] for name in variants}
        passes: dict = {name: [] for name in variants}
        other, rows = 0, []
        for turn in range(ROUNDS.value + 1):
            condition = text([scene("test", turn * batch + i).caption for i in range(batch)], 24)
            drawn = {}
            for name, settings in variants.items():
                start = time.perf_counter(), time.process_time()
                drawn[name] = sample(
                    model, condition, cfg_scale=1.5, top_p=0.9, seed=np.arange(batch) + 100 * turn, **settings
                )
                jax.block_until_ready(drawn[name].codes)
                if turn:  # the first round compiles
                    ends = time.perf_counter(), time.process_time()
                    times[name].append([(end - begin) / batch * 1e3 for begin, end in zip(start, ends, strict=True)])
                passes[name] += (np.asarray(drawn[name].drawn_in)[:, -1] + 1).tolist()
                other += int((drawn[name].codes != drawn["plain", ""].codes).any()) if name[0] != "guard" else 0
        for name, values in times.items():
            ratios = np.median(np.array(values) / np.array(times["plain", ""]), axis=0).tolist()
            mean, (wall, cpu) = float(np.mean(passes[name])), np.median(values, axis=0).tolist()
            rows.append([*name, mean, cells / mean, wall, ratios[0], cpu, ratios[1]])
        print(f"batch {batch}, {other} windows with a picture other than plain's, median of {ROUNDS.value}")
        print(table(columns, rows), flush=True)


if __name__ == "__main__":
    app.run(main)
