"""Measures a decode step at Janus-Pro-1B's shape: plain, DAiD and FAiD, compared with Janus of ``transformers``.

python benchmarks/decode.py [--dtypes=float32,bfloat16] [--batches=1,4] [--rounds=3] [--sides=arrag_jax]
python benchmarks/decode.py --dtypes=float32 --batches=1 --sides=arrag_jax --methods=plain,hidden

The weights are random. Guidance is on (2 x batch rows). Only the first ``--cells`` positions of a 24 x 24 image are
generated, but on both sides the cache has room for the whole image. DAiD searches 1,000,000 random patches with ScaNN,
K = 2048. Method "hidden" is DAiD by the state of the step, over 999,936 random hidden keys of 64 numbers, K = 64. FAiD
has two blenders (layers 0 and 12) and takes the nearest 10 patches of DAiD's search. Method "int8" is plain with the
decoder's linear layers in int8. Each side runs in its own process.
The sides take turns in every round, so that slow changes of the machine affect both. The time of a step is the time of
the generation, including the prompt of 32 tokens, divided by the number of positions. "of bandwidth" is the rate at
which a step reads its weights, as a share of the rate at which a sum over 2 GiB reads memory on this machine.
``transformers`` comes with requirements-dev.txt.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

CELLS = 576  # of an image
PROMPT, PATCHES, DAID_K, GUIDANCE = 32, 1_000_000, 2048, 5.0
HIDDEN_NUMBERS, HIDDEN_K = 64, 64
METHODS = {"arrag_jax": ("plain", "daid", "faid", "hidden", "int8"), "transformers": ("plain",)}
Draw = Callable[[str, int], None]  # takes a method and a batch size; returns when the codes are ready


def prompts(batch: int) -> np.ndarray:
    """Returns random prompts, the same for both sides."""
    return np.random.default_rng(1).integers(0, 1000, (batch, PROMPT))


def hidden_patches(width: int, codes: int, images: int, cells: int, rng: np.random.Generator) -> Any:
    """Returns the patches of images with random hidden keys, and the projection of states of this width."""
    from arrag_jax.ops.keys import HIDDEN
    from arrag_jax.retrieval.patches import KeysOfRows, Patches

    records = rng.integers(0, 256, (images, HIDDEN.record_bytes(cells, HIDDEN_NUMBERS)), np.uint8)
    table = rng.standard_normal((width + 2, HIDDEN_NUMBERS), np.float32) / np.float32(width)
    table[-1] = 1
    values = rng.integers(0, codes, images * cells).astype(np.int32)
    return Patches(KeysOfRows(HIDDEN, records, table, 0, len(values)), values, HIDDEN), table


def hidden_search(width: int, codes: int, rng: np.random.Generator) -> Any:
    """Returns a search with ScaNN over random hidden keys."""
    import jax.numpy as jnp

    from arrag_jax.config import ScannOptions
    from arrag_jax.retrieval.scann import ScannRetriever, build_host
    from arrag_jax.retrieval.states import HiddenRetriever

    patches, table = hidden_patches(width, codes, PATCHES // CELLS, CELLS, rng)
    host = build_host(lambda rows: patches, len(patches.codes), table, HIDDEN_K, ScannOptions())
    return HiddenRetriever(ScannRetriever.of(host), jnp.asarray(table))


def first_cells(config: Any, dtype: str, cells: int, rng: np.random.Generator) -> tuple[Any, int, int]:
    """Returns a Janus of this shape with random weights that draws only the first positions of its grid.

    Returns:
      the model without its image tokenizer, the bytes of weights that a step reads, and those that blenders add.
    """
    import jax.numpy as jnp
    from flax import nnx

    from arrag_jax.models.janus import Janus
    from arrag_jax.ops.blend import live_offsets

    class FirstCells(Janus):
        """Generates only the first positions; cache and windows are those of the whole grid."""

        @property
        def grid(self) -> tuple[int, int]:
            return cells // self.config.grid[1], self.config.grid[1]

        def prefill(self, condition, blended_rows=0):
            prompt_ids, prompt_mask = condition
            x, room = self.language_model.embed_tokens(prompt_ids), int(np.prod(self.config.grid))
            return x[:, -1], self.language_model.prefill(x[:, :-1], prompt_mask[:, :-1], room, blended_rows)

        def step_state(self, hidden, cache, cell, features=None):
            return self.language_model.step(hidden, cache, cell, self.config.grid, features)

    parts = ("language_model", "gen_embed", "gen_aligner", "gen_head")
    model, read = nnx.eval_shape(lambda: FirstCells(config, nnx.Rngs(0), parts)), 0
    for path, value in nnx.to_flat_state(nnx.state(model)):
        numbers = rng.standard_normal(value.shape, np.float32) * np.float32(0.02) + np.float32("scale" in path[-1])
        value.set_value(jnp.asarray(numbers, dtype))
        if "blender" not in path and path[-1] != "embedding":
            read += value[...].nbytes
    if config.faid is None:
        return model, read, 0
    blender = (len(live_offsets(max(config.faid.hops))) + 1) * config.language.width**2 * jnp.dtype(dtype).itemsize
    return model, read, sum(layer.blender is not None for layer in model.language_model.layers) * blender


def in_int8(model: Any, read: int) -> tuple[Any, int]:
    """Returns a copy of a model that holds its linear layers in int8, and the bytes that its step reads.

    Args:
      read: the bytes that a step of the model reads.
    """
    from flax import nnx

    def held(decoder: Any) -> int:
        return sum(value[...].nbytes for path, value in nnx.to_flat_state(nnx.state(decoder.layers)))

    copy = nnx.merge(*nnx.split(model))
    copy.language_model.hold_in_int8()
    return copy, read - held(model.language_model) + held(copy.language_model)


def ours(dtype: str, cells: int, methods: Sequence[str]) -> tuple[Draw, dict[str, float]]:
    """Returns this package's generation function, and the GB of weights that a step of each method reads."""
    import jax

    from arrag_jax.decode.loop import sample
    from arrag_jax.decode.policies import Daid, Faid, Plain
    from arrag_jax.models.presets import PRESETS
    from arrag_jax.nn.faid import FaidConfig
    from arrag_jax.retrieval.scann import ScannRetriever

    config, rng = dataclasses.replace(PRESETS["janus-pro-1b"], faid=FaidConfig()), np.random.default_rng(0)
    model, read, blenders = first_cells(config, dtype, cells, rng)
    codebook = rng.standard_normal((config.vision.codebook_size, config.vision.code_dim), np.float32)
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    searches: dict[str, Any] = {"plain": None}
    if {"daid", "faid"} & set(methods):
        stored = rng.integers(0, len(codebook), (PATCHES, 5)).astype(np.int32)
        keys = codebook[stored[:, :4]].reshape(PATCHES, -1)
        searches["daid"] = searches["faid"] = ScannRetriever.create(keys, stored[:, 4], codebook, DAID_K)
    if "hidden" in methods:
        searches["hidden"] = hidden_search(config.language.width, config.vision.codebook_size, rng)
    policies = {"plain": Plain(), "daid": Daid(0.1, 0.05), "faid": Faid(), "hidden": Daid(0.9, 0.02, "sum")}
    models, reads = dict.fromkeys(policies, model), dict.fromkeys(policies, read) | {"faid": read + blenders}
    if "int8" in methods:
        models["int8"], reads["int8"] = in_int8(model, read)
        policies["int8"], searches["int8"] = Plain(), None

    def draw(method: str, batch: int) -> None:
        retriever = searches[method]
        drawn = sample(models[method], prompts(batch), policies[method], retriever, cfg_scale=GUIDANCE)
        jax.block_until_ready(drawn.codes)

    return draw, {name: number / 1e9 for name, number in reads.items()}


def theirs(dtype: str, cells: int, methods: Sequence[str]) -> tuple[Draw, dict[str, float]]:
    """Returns the same as ``ours`` for ``JanusForConditionalGeneration.generate``."""
    import torch
    from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(0)
    text = {
        "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5632, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {"num_hidden_layers": 1, "num_image_tokens": cells}  # the tower that reads images is not used
    model = JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision)).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=3, generation_kwargs={"boi_token_id": 2}
    )
    weights = [
        p for name, p in model.model.named_parameters() if name.startswith(("language_model.layers", "generation_"))
    ]
    read = sum(p.numel() * p.element_size() for p in weights if p.ndim) / 1e9

    def draw(method: str, batch: int) -> None:
        ids = torch.from_numpy(prompts(batch))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=True,
            guidance_scale=GUIDANCE, max_length=PROMPT + 576,
        )  # fmt: skip

    return draw, {"plain": read}


def serve(side: str, dtype: str, cells: int, methods: Sequence[str]) -> None:
    """Runs the child process: for each line "method batch" on stdin, generates once and prints a line of JSON."""
    draw, read = {"arrag_jax": ours, "transformers": theirs}[side](dtype, cells, methods)
    for line in sys.stdin:
        method, batch = line.split()
        start = time.perf_counter()
        draw(method, int(batch))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "gib": peak, "read": read[method]}), flush=True)


def bandwidth() -> float:
    """Returns the GB per second that all cores together read when they sum 2 GiB; the best of five runs."""
    parts, best = [np.ones(2**29 // os.cpu_count(), np.float32) for _ in range(os.cpu_count())], 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, sum(part.nbytes for part in parts) / 1e9 / (time.perf_counter() - start))
    return best


def measure(
    dtype: str, batches: list[int], rounds: int, cells: int, sides: list[str], methods: list[str]
) -> list[dict]:
    """Returns the rows of the table for one dtype."""
    children = {
        side: subprocess.Popen(
            [
                sys.executable, __file__, f"--serve={side}", f"--dtypes={dtype}", f"--cells={cells}",
                f"--methods={','.join(methods)}",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for side in sides
    }  # fmt: skip
    jobs = [
        (batch, side, method) for batch in batches for side in sides for method in METHODS[side] if method in methods
    ]
    answers: dict[tuple, list[dict]] = {job: [] for job in jobs}
    for batch in batches:
        for _ in range(rounds + 1):  # the first round compiles
            for job in jobs:
                if job[0] == batch:
                    child = children[job[1]]
                    child.stdin.write(f"{job[2]} {batch}\n")
                    child.stdin.flush()
                    answers[job].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()
    rows = []
    for (batch, side, method), (first, *rest) in answers.items():
        step = statistics.median(answer["seconds"] for answer in rest) / cells
        rows.append(
            {
                "dtype": dtype, "batch": batch, "side": side, "method": method, "ms": step * 1e3,
                "compile": first["seconds"] - step * cells, "gib": rest[-1]["gib"], "rate": rest[-1]["read"] / step,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,4", help="images drawn at once")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each; the median is printed")
    parser.add_argument("--cells", type=int, default=72, help="cells drawn, in whole rows of 24, at least two")
    parser.add_argument("--sides", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--methods", default="plain,daid,faid", help=f"of {', '.join(METHODS['arrag_jax'])}")
    parser.add_argument("--serve", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.dtypes, args.cells, args.methods.split(","))
        return
    top = bandwidth()
    print(f"{args.cells} cells, median of {args.rounds}; a sum reads {top:.1f} GB/s\n")
    columns = [
        "dtype",
        "images",
        "",
        "ms a step",
        "of plain",
        "of transformers",
        "first call s",
        "peak GiB",
        "of bandwidth",
    ]
    print("| " + " | ".join(columns) + " |\n| --- | ---: | --- |" + " ---: |" * (len(columns) - 3))
    for dtype in args.dtypes.split(","):
        batches, sides, methods = (text.split(",") for text in (args.batches, args.sides, args.methods))
        rows = measure(dtype, list(map(int, batches)), args.rounds, args.cells, sides, methods)
        found = {(row["batch"], row["side"], row["method"]): row["ms"] for row in rows}
        for row in rows:
            plain = found[row["batch"], row["side"], "plain"]
            other = found.get((row["batch"], "transformers", "plain"), float("nan"))
            figures = [row["ms"], row["ms"] / plain, row["ms"] / other, row["compile"], row["gib"], row["rate"] / top]
            cells = " | ".join(f"{value:.3g}" for value in figures)
            print(f"| {dtype} | {row['batch']} | {row['side']} {row['method']} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
