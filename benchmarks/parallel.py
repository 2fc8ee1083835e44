"""Measures windows (several positions per pass) and the guard against copies, beside plain drawing.

python benchmarks/parallel.py --store=FOLDER [--windows=4,8,16,32] [--batches=1,4,16] [--rounds=3] [--most=16]

The embedded checkpoint draws test prompts, guidance 1.5 and top-p 0.9; FOLDER is a datastore of its tokenizer
(``configs/emoji_datastore.py``). All variants of a batch take turns in every round, so that slow changes of the machine
affect all of them. The table has, per window and guess: passes per picture, positions per pass, and medians of the
milliseconds per picture and of their ratio to plain drawing in the same round, by the clock and of CPU time (of all
threads), which other programs on the machine change less. Guess "above" is the code above, guess
"stored" reads the window again by what the stored images hold (``retrieval.guesses``). The rows "guard" draw plain with
``max_copied_cells``. The first round compiles and is not counted. All windows' pictures are compared with plain's.

"least ms, v5e" is no measurement but a roofline of plain passes over a window, in bfloat16 with guidance, without
guesses and search: the matrix products of the program (``rooflines.flops_of``) at the chip's peak rate, or weights and
cache at the rate of its memory, whichever takes longer, times the passes that the embedded model needed. "1B shape" is
the same for Janus-Pro-1B's shape, 576 positions; it takes the embedded model's positions per pass, which no model of
this shape has shown.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from rooflines import flops_of

from arrag_jax.data.emoji.scenes import scene
from arrag_jax.decode.checks import sampling_of
from arrag_jax.decode.loop import begin, lowered, sample
from arrag_jax.decode.policies import Plain
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.janus import Janus
from arrag_jax.models.presets import PRESETS
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.models.weights import set_dtypes
from arrag_jax.nn.abstract import abstract
from arrag_jax.retrieval.stored_codes import StoredCodes
from arrag_jax.store.datastore import Datastore
from arrag_jax.topology import CHIPS, held_bytes

SHAPES = {"emoji": PRESETS["janus-emoji"], "1b": PRESETS["janus-pro-1b"]}
PROMPT, WORDS = 24, 128  # tokens of a prompt, and of the vocabulary, whose table is not counted
MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
STORE = flags.DEFINE_string("store", None, "folder of a datastore", required=True)
WINDOWS = flags.DEFINE_list("windows", ["4", "8", "16", "32"], "positions per pass")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "pictures drawn at once")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timings of each variant; the median is printed")
MOST = flags.DEFINE_integer("most", 16, "max_copied_cells of the guard")


@functools.cache
def least_ms(shape: str, window: int, batch: int) -> float:
    """Returns the milliseconds per picture that a pass takes at least on a chip of v5e."""
    config, chip = SHAPES[shape], CHIPS["v5e"]
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, vocab_size=WORDS))
    model = abstract(Janus, config=config, parts=("language_model", "gen_embed", "gen_aligner", "gen_head"))
    set_dtypes(model, "bfloat16", ())
    graph, state = nnx.split(model)
    cond = model.condition_shapes(batch, PROMPT)
    uncond = jax.eval_shape(model.unconditional, cond)

    def begun(state: Any, cond: Any, uncond: Any) -> Any:
        return begin(nnx.merge(graph, state), cond, uncond, Plain(), batch, windows=window > 1)

    drawing = jax.eval_shape(begun, state, cond, uncond)
    sampling = sampling_of(model, {"cfg_scale": 1.5, "top_p": 0.9, "window": window}, False)
    keys, until = jax.eval_shape(jax.vmap(jax.random.key), jnp.zeros(batch, jnp.int32)), jnp.int32(1)
    program = lowered(graph, state, Plain(), None, keys, sampling, None, None, drawing, until, mesh=None)
    weights = [value for path, value in nnx.to_flat_state(state) if path[-1] != "embedding"]
    moved = held_bytes(weights) + held_bytes((drawing.cache.keys, drawing.cache.values))
    return max(flops_of(program) / chip.flops, moved / chip.bandwidth) * 1e3 / batch


def main(_: list[str]) -> None:
    """Prints a table per batch size."""
    model, text, store = load_model(MODEL), PromptTokenizer.load(MODEL), Datastore.open(STORE.value)
    stored, cells = StoredCodes.of(store.codes, model.codebook_size), int(np.prod(model.grid))
    print(f"{jax.devices()[0].device_kind}, {store.num_patches:,} patches")
    variants = {("plain", ""): {}, ("guard", f"{MOST.value}"): {"max_copied_cells": MOST.value, "stored": stored}}
    columns = ["", "guess", "passes", "positions per pass", "ms", "of plain", "CPU ms", "of plain"]
    columns += ["least ms, v5e", "1B shape"]
    for window in map(int, WINDOWS.value):
        variants |= {(f"window {window}", name): {"window": window, "stored": images} for name, images in
                     (("above", None), ("stored", stored))}  # fmt: skip
    for batch in map(int, BATCHES.value):
        times: dict = {name: [] for name in variants}
        passes: dict = {name: [] for name in variants}
        other, rows = 0, []
        for turn in range(ROUNDS.value + 1):
            condition = text([scene("test", turn * batch + i).caption for i in range(batch)], PROMPT)
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
            window = variants[name].get("window", 1)
            least = [least_ms("emoji", window, batch) * mean, least_ms("1b", window, batch) * mean * 576 / cells]
            rows.append([*name, mean, cells / mean, wall, ratios[0], cpu, ratios[1], *least])
        print(f"batch {batch}, {other} windows with a picture other than plain's, median of {ROUNDS.value}")
        print(table(columns, rows), flush=True)


if __name__ == "__main__":
    app.run(main)
