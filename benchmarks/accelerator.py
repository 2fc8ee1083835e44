"""Measures all times of docs/speed.md on the device that JAX finds, each beside the least time that the device allows.

python benchmarks/accelerator.py [--shape=1b|emoji] [--budget=540] [--out=FOLDER]
python benchmarks/accelerator.py --tables=decode,search --patches=1000000,10000000

One position of 1, 4 and 16 images (guidance on, so twice as many rows) is drawn plain, plain with the decoder's linear
layers in int8, by DAiD with a dense search, and by hidden states; a FAiD step is run with and without its blenders; the
dense search is run alone; images are encoded and decoded. Weights and stores are random. "1b" is Janus-Pro-1B's shape
in bfloat16, the default on accelerators; "emoji" is the embedded model's in float32, the default on a CPU.

"least ms" is the roofline: the larger of the operations of all matrix products divided by the device's peak rate, and
of the bytes that have to be moved at least divided by its memory's rate. Decoding moves weights, cache and the scored
keys; a training step its parameters and gradients; a search its keys; the tokenizer its weights and pixels. Peak rates
of TPUs and of NVIDIA's H100, H200 and A100 are those of their data sheets; of a CPU and of unknown devices they are
measured in the same run. What fits into a CPU's cache may be faster than its memory allows.

Each table gets an equal share of what is left of ``--budget`` seconds. A row is left out, and named, if it would
probably end after its table's share, as the slowest row of the table so far did. The table is printed and written to
``accelerator.md`` in ``--out``, the figures to ``accelerator.json``.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from decode import GUIDANCE, HIDDEN_K, first_cells, hidden_patches, in_int8, prompts
from faid_step import CASES, measure
from flax import nnx
from retrieval import CALLS, call_ms, dense_search
from rooflines import Rates, bytes_of, flops_of, rates_of

from arrag_jax.decode.loop import lowered, prepare
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.figures.grids import table
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import KeysOfContexts, Patches
from arrag_jax.retrieval.states import HiddenRetriever
from arrag_jax.store.images import encode_compiled

SECONDS, TIMES = 1.0, 3  # a row is timed for so long, at least so often


class Shape(NamedTuple):
    """What is measured.

    Attributes:
      case: name of the model's shape in ``faid_step.CASES``.
      cells: positions that are drawn of an image; whole rows, at least two.
      drawn_from: patches that drawing searches.
      patches: patches that are searched without drawing.
      k: neighbours of four-code keys.
      tuned: images of a FAiD step.
      pictures: images that are encoded or decoded together.
      batches: images that are drawn together.
      queries: contexts that are searched together.
    """

    case: str
    dtype: str
    cells: int
    drawn_from: int
    patches: tuple[int, ...]
    k: int
    tuned: int
    pictures: int
    batches: tuple[int, ...] = (1, 4, 16)
    queries: tuple[int, ...] = CALLS


SHAPES = {
    "1b": Shape("1b", "bfloat16", 48, 1_000_000, (10**7, 10**8), 2048, 4, 16),
    "emoji": Shape("emoji", "float32", 48, 100_000, (10**5, 10**6), 128, 1, 32),
    "tiny": Shape("emoji", "float32", 24, 2000, (2000,), 8, 1, 2, (1,), (1,)),  # for the tests
}


class Row(NamedTuple):
    """A measurement: seconds of one unit, such as a step, its operations, and the bytes that it moves at least."""

    unit: str
    seconds: float
    flops: float
    bytes: float
    note: str = ""


Rows = dict[str, Callable[[], Row]]


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the median seconds of a call; the first one, which compiles, does not count."""
    jax.block_until_ready(work())
    times: list[float] = []
    while len(times) < TIMES or sum(times) < SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_patches(number: int, codebook: np.ndarray, rng: np.random.Generator) -> Patches:
    """Returns patches with a random context each, which counts as its own."""
    contexts = rng.integers(0, len(codebook), (number, 4), np.uint16)
    values = rng.integers(0, len(codebook), number, np.uint16)
    kind, rows = KEY_KINDS["codebook"], np.arange(number + 1, dtype=np.int32)
    return Patches(KeysOfContexts(kind, contexts, codebook), values, kind, contexts, rows, rows[:-1])


def random_codebook(size: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns unit vectors, float32 [V, C]."""
    codebook = rng.standard_normal((size, width), np.float32)
    return codebook / np.linalg.norm(codebook, axis=1, keepdims=True)


def scored(retriever: DenseRetriever, queries: int) -> tuple[float, int]:
    """Returns the operations and the bytes of a search that scores every key once for some queries."""
    if retriever.keys is None:  # four numbers are looked up and added
        return 4.0 * queries * len(retriever.contexts), bytes_of((retriever.contexts, retriever.starts))
    beside = retriever.codes if retriever.starts is None else retriever.starts  # they say which keys have a patch
    return 2.0 * queries * retriever.keys.size, bytes_of((retriever.keys, beside))


def decode_rows(shape: Shape) -> Rows:
    """Returns the rows of drawing, by method and number of images."""

    @functools.cache
    def opened() -> tuple[dict[str, tuple[Any, int]], dict[str, tuple[Any, Any]]]:
        config, rng = dataclasses.replace(CASES[shape.case], faid=None), np.random.default_rng(0)
        model, read, _ = first_cells(config, shape.dtype, shape.cells, rng)
        codebook = random_codebook(config.vision.codebook_size, config.vision.code_dim, rng)
        patches = random_patches(shape.drawn_from, codebook, rng)
        cells = config.grid[0] * config.grid[1]
        of_states, projection = hidden_patches(
            config.language.width, len(codebook), shape.drawn_from // cells, cells, rng
        )
        k = min(HIDDEN_K, len(of_states.codes))
        states = DenseRetriever.of(of_states, projection, k, "int8")
        searches = {
            "plain": (Plain(), None),
            "plain, int8": (Plain(), None),
            "DAiD, dense": (Daid(0.1, 0.05), DenseRetriever.of(patches, codebook, shape.k, "codes")),
            "hidden, dense": (Daid(0.9, 0.02, "sum"), HiddenRetriever(states, jnp.asarray(projection))),
        }
        return {"plain, int8": in_int8(model, read), "": (model, read)}, searches

    def row(method: str, images: int) -> Row:
        models, searches = opened()
        model, read = models.get(method, models[""])
        policy, retriever = searches[method]

        def begun(policy: Any, retriever: Any) -> Any:
            return prepare(model, prompts(images), policy, retriever, cfg_scale=GUIDANCE)

        # Of a loop whose length is not known the body counts once: one position, without the loops of a search.
        plain = begun(*searches["plain"])
        flops = flops_of(lowered(*plain.model, *plain.rest, plain.drawing, np.int32(1), mesh=None))
        moved = read + bytes_of((plain.drawing.cache.keys, plain.drawing.cache.values))
        if retriever is not None:
            more = scored(getattr(retriever, "local", retriever), images)
            flops, moved = flops + more[0], moved + more[1]
        seconds = seconds_of(lambda: begun(policy, retriever).until(shape.cells).drawing.out.codes)
        note = "" if retriever is None else f"{shape.drawn_from:,} patches, K {retriever.k}"
        return Row("step", seconds / shape.cells, flops, moved, note)

    methods = ("plain", "plain, int8", "DAiD, dense", "hidden, dense")
    return {f"{name}, {n} images": functools.partial(row, name, n) for n in shape.batches for name in methods}


def faid_rows(shape: Shape) -> Rows:
    """Returns the rows of a FAiD step, the one without blenders first."""
    without: dict[str, float] = {}

    def row(form: str) -> Row:
        figures = measure(shape.case, form, shape.tuned, TIMES, shape.dtype)
        seconds = float(figures["seconds"])
        without.setdefault("seconds", seconds)
        share = f", {1 - without['seconds'] / seconds:.0%} of it blenders" if form == "fast" else ""
        note = f"{shape.tuned} images, peak {figures['gib']:.1f} GiB{share}"
        return Row("step", seconds, float(figures["flops"]), float(figures["bytes"]), note)

    return {"without blenders": functools.partial(row, "none"), "FAiD": functools.partial(row, "fast")}


def search_rows(shape: Shape) -> Rows:
    """Returns the rows of the dense search: of code ids, and of keys in bytes at the smallest size."""
    vision = CASES[shape.case].vision

    @functools.lru_cache(maxsize=1)  # because two searches may not fit into a device's memory
    def opened(number: int, storage: str) -> tuple[Any, DenseRetriever]:
        rng = np.random.default_rng(0)
        codebook = random_codebook(vision.codebook_size, vision.code_dim, rng)
        patches = random_patches(number, codebook, rng)
        return dense_search(patches, codebook, storage)[0], DenseRetriever.of(patches, codebook, 1, storage)

    def row(number: int, storage: str, queries: int) -> Row:
        search, retriever = opened(number, storage)
        asked = np.random.default_rng(1).integers(0, vision.codebook_size, (256, 4), np.int32)
        search(asked[:queries], shape.k)  # compiles
        return Row("call", call_ms(search, asked, queries, shape.k) / 1e3, *scored(retriever, queries), f"K {shape.k}")

    kinds = [(n, storage) for n in shape.patches for storage in ("codes", "int8")[: 2 if n == shape.patches[0] else 1]]
    return {
        f"{n:,} patches as {storage}, {queries} queries": functools.partial(row, n, storage, queries)
        for n, storage in kinds
        for queries in shape.queries
    }


def picture_rows(shape: Shape) -> Rows:
    """Returns the rows of the image tokenizer, per image."""
    config, count = CASES[shape.case], shape.pictures
    height, width = config.grid

    @functools.cache
    def opened() -> tuple[Any, Any]:
        return nnx.split(Janus(config, nnx.Rngs(0), VISION))

    @jax.jit(static_argnums=0)
    def decode(graph: Any, state: Any, codes: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).decode_codes(codes, height, width)

    def row(program: Any, given: np.ndarray, part: str) -> Row:
        graph, state = opened()
        arguments = graph, state, jax.device_put(given)
        seconds, flops = seconds_of(lambda: program(*arguments)), flops_of(program.lower(*arguments))
        weights = getattr(nnx.merge(graph, state).vq, part)
        pixels = count * 3 * 4 * config.image_size[0] * config.image_size[1]
        moved = bytes_of(nnx.state(weights)) + pixels
        return Row("image", seconds / count, flops / count, moved / count, f"batches of {count}, float32")

    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (count, *config.image_size, 3)).astype(np.float32)
    codes = rng.integers(0, config.vision.codebook_size, (count, height * width), np.int32)
    return {
        "encode": functools.partial(row, encode_compiled, pixels, "encoder"),
        "decode": functools.partial(row, decode, codes, "decoder"),
    }


TABLES = {"decode": decode_rows, "faid": faid_rows, "search": search_rows, "tokenizer": picture_rows}


def measured(shape: Shape, tables: list[str], rates: Rates, budget: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the figures of all rows, and the rows that were left out with the reason."""
    end, figures, left_out = time.perf_counter() + budget, [], []
    for number, name in enumerate(tables):
        dearest, rows, start = 0.0, TABLES[name](shape), time.perf_counter()
        until = start + (end - start) / (len(tables) - number)
        for title, work in rows.items():
            start = time.perf_counter()
            if start + dearest > until:
                left_out.append(f"{name}: {title} (no time)")
                continue
            try:
                row = work()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                left_out.append(f"{name}: {title} (the device's memory does not hold it)")
                continue
            dearest = max(dearest, time.perf_counter() - start)
            least, bound = rates.least_seconds(row.flops, row.bytes)
            more = {"least_seconds": least, "bound_by": bound, "of_least": row.seconds / least}
            figures.append({"table": name, "row": title, **row._asdict(), **more})
            print(f"{name}: {title}: {1e3 * row.seconds:.3f} ms per {row.unit}", flush=True)
    return figures, left_out


def markdown(figures: list[dict[str, Any]]) -> str:
    """Returns the figures as a table."""
    columns = ["", "", "per", "ms", "least ms", "bound by", "of least", "GFLOP", "GB", ""]
    rows = []
    for row in figures:
        times = [1e3 * row["seconds"], 1e3 * row["least_seconds"]]
        of_least = [row["bound_by"], f"{row['of_least']:.2f} x", row["flops"] / 1e9, row["bytes"] / 1e9]
        rows.append([row["table"], row["row"], row["unit"], *times, *of_least, row["note"]])
    return table(columns, rows)


def main() -> None:
    """Measures, prints the table and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: 1b on accelerators, emoji on a CPU")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--patches", default="", help="stored patches of the search; default: by the shape")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all tables")
    parser.add_argument("--out", default="runs/accelerator", help="folder of accelerator.md and accelerator.json")
    args = parser.parse_args()
    device = jax.devices()[0]
    name = args.shape or ("emoji" if device.platform == "cpu" else "1b")
    shape, tables = SHAPES[name], args.tables.split(",")
    if unknown := sorted(set(tables) - set(TABLES)):
        parser.error(f"--tables={','.join(unknown)} is unknown; choose of {', '.join(TABLES)}")
    if args.patches:
        shape = shape._replace(patches=tuple(map(int, args.patches.split(","))))
    begun, rates = time.perf_counter(), rates_of(device, shape.dtype)
    figures, left_out = measured(shape, tables, rates, args.budget - (time.perf_counter() - begun))
    seconds = time.perf_counter() - begun
    head = (
        f"{rates.device}, {jax.device_count()} device; shape {name}, {shape.dtype}; "
        f"{rates.flops / 1e12:.3g} TFLOP/s and {rates.bytes / 1e9:.4g} GB/s ({rates.source}); {seconds:.0f} s in all"
    )
    text = "\n".join(
        [head, "", markdown(figures), *(["", *(f"Left out: {row}" for row in left_out)] if left_out else [])]
    )
    print(f"\n{text}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "accelerator.md").write_text(text + "\n")
    record = {"device": rates._asdict(), "shape": name, **shape._asdict(), "seconds": seconds}
    (out / "accelerator.json").write_text(json.dumps(record | {"rows": figures, "left_out": left_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
