"""Measures a decode step of the embedded model: plain and DAiD, by search, batch size and number of patches.

python benchmarks/decode_small.py [--rounds=5]
python benchmarks/decode_small.py --int8 [--scenes=64]

In every round all methods are timed one after another in one process, so that slow changes of the machine affect all of
them. The table has medians over rounds ("beyond mixing": medians of the differences within a round). A step is one
position of the whole batch with guidance (2 x batch rows). "mixing" is DAiD with a search on the device that takes no
time; it shows the cost of the policy itself. "host call" is the same with a search on the host; it shows the additional
cost of leaving the compiled loop. "pure_callback" uses JAX's own callback for this.

With --int8, the model is compared with itself in weight-only int8 instead: bytes of its decoder, the error of its
logits on test scenes and how often both put the same code first there, greedy drawings code for code, times of a step.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from arrag_jax.data.emoji.scenes import render, scene
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.figures.grids import table
from arrag_jax.models.checkpoint import load_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.nn.vq import from_uint8
from arrag_jax.ops.grid import contexts_of_grids, next_codes_of_grids
from arrag_jax.ops.host import host_call
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import Patches
from arrag_jax.retrieval.scann import ScannRetriever, build_host

MODEL = Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus"
ROUNDS = flags.DEFINE_integer("rounds", 5, "timings of each method; the median is printed")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "pictures drawn at once")
PATCHES = flags.DEFINE_list("patches", ["100000", "1000000"], "stored patches")
K = flags.DEFINE_integer("k", 128, "neighbours a cell")
INT8 = flags.DEFINE_bool("int8", False, "compare the model with its weights in int8")
SCENES = flags.DEFINE_integer("scenes", 64, "scenes of --int8")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["zero"], meta_fields=["k", "way"])
@dataclasses.dataclass(frozen=True, eq=False)
class InstantRetriever:
    """A search that takes no time, on the device or on the host.

    Attributes:
      zero: 0 as a traced value, so that XLA can neither know the result nor compute its consequences once for all
        positions.
      k: number of neighbors.
      way: "device", or the kind of call to the host: "host call" or "pure_callback".
    """

    zero: Any
    k: int
    way: str

    def search(self, context: jax.Array) -> Neighbors:
        """Returns code 0 at distance 0, k times, for every context."""
        shape = (len(context), self.k)
        kinds = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32))
        context = context * self.zero
        if self.way == "device":
            zeros = context[:, :1] + self.zero * jnp.arange(self.k)  # no broadcast, which XLA could mix at lower cost
            return Neighbors(*(zeros.astype(kind.dtype) for kind in kinds))
        call = host_call if self.way == "host call" else jax.pure_callback
        return Neighbors(*call(functools.partial(_zeros, kinds), kinds, context))


def _zeros(kinds: tuple[jax.ShapeDtypeStruct, ...], _: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(kind.shape, kind.dtype) for kind in kinds)


def stored(model: Any, number: int) -> Patches:
    """Returns ``number`` patches of scenes of the store split, deduplicated as in a datastore."""
    height, width = model.grid
    images = -(-number // ((height - 1) * (width - 2)))
    grids = []
    for start in range(0, images, 256):
        pictures = np.stack([render(scene("store", i)) for i in range(start, min(start + 256, images))])
        grids.append(np.asarray(model.encode_images(from_uint8(pictures))[0]).reshape(-1, height, width))
    codes = np.concatenate(grids)
    contexts, values = contexts_of_grids(codes).reshape(-1, 4), next_codes_of_grids(codes).reshape(-1)
    return Patches.deduplicate(contexts[:number], values[:number].astype(np.int32), np.asarray(model.codebook))


def compare_int8() -> None:
    """Prints how the model in int8 differs from itself in float32."""
    models, text = (
        {name: load_model(MODEL, int8=name == "int8") for name in ("float32", "int8")},
        PromptTokenizer.load(MODEL),
    )
    held = {name: sum(x.nbytes for x in jax.tree.leaves(nnx.state(m.language_model))) for name, m in models.items()}
    scenes = [scene("test", number) for number in range(SCENES.value)]
    condition = text([each.caption for each in scenes])
    codes, _ = models["float32"].encode_images(from_uint8(np.stack([render(each) for each in scenes])))
    logits = {name: np.asarray(model.score(condition, codes)) for name, model in models.items()}
    away = np.abs(logits["int8"] - logits["float32"])
    bits = {name: float(-np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), np.asarray(codes)[..., None], -1).mean())
            for name, x in logits.items()}  # fmt: skip
    first = float((logits["int8"].argmax(-1) == logits["float32"].argmax(-1)).mean())
    drawn: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS.value + 1):
        for name, model in models.items():
            start = time.perf_counter()
            drawn[name] = np.asarray(sample(model, condition, cfg_scale=1.5, greedy=True).codes)
            if turn:  # the first round compiles
                times[name].append((time.perf_counter() - start) / drawn[name].shape[1] * 1e3)
    same = drawn["int8"] == drawn["float32"]
    print(f"decoder: {held['float32']:,} bytes, in int8 {held['int8']:,}")
    deviation, (whole, rounded) = logits["float32"].std(), (bits[name] / np.log(2) for name in models)
    print(f"{len(scenes)} test scenes: logits differ by {away.max():.3f} at most, {away.mean():.4f} on average")
    print(f"(their standard deviation is {deviation:.2f}); the same code is first at {first:.2%} of the positions;")
    print(f"{whole:.4f} bits per code, in int8 {rounded:.4f}")
    print(f"greedy drawings: {same.mean():.1%} of the codes are equal, {same.all(1).mean():.1%} of the images")
    print(
        ", ".join(
            f"{name} {statistics.median(found):.2f} ms a step of {len(scenes)} images" for name, found in times.items()
        )
    )


def main(_: list[str]) -> None:
    """Prints the table."""
    if INT8.value:
        compare_int8()
        return
    model, text = load_model(MODEL), PromptTokenizer.load(MODEL)
    codebook, cells, rows = np.asarray(model.codebook), int(np.prod(model.grid)), []
    for patches in map(int, PATCHES.value):
        fused = stored(model, patches)
        host = build_host(lambda rows, fused=fused: fused, patches, codebook, K.value)
        searches = {
            "mixing": InstantRetriever(jnp.int32(0), K.value, "device"),
            "host call": InstantRetriever(jnp.int32(0), K.value, "host call"),
            "pure_callback": InstantRetriever(jnp.int32(0), K.value, "pure_callback"),
            "DAiD, ScaNN": ScannRetriever.of(host),
            "DAiD, dense": DenseRetriever.of(fused, codebook, K.value),
        }
        for batch in map(int, BATCHES.value):
            ids, mask = text(["a blue car and a green fish"] * batch)
            methods = {"plain": (Plain(), None)} | {name: (Daid(0.1, 0.05), s) for name, s in searches.items()}
            times: dict[str, list[float]] = {name: [] for name in methods}
            for turn in range(ROUNDS.value + 1):
                for name, (policy, search) in methods.items():
                    start = time.perf_counter()
                    drawn = sample(model, ids, policy, search, cfg_scale=2.0, prompt_mask=mask, seed=turn)
                    jax.block_until_ready(drawn.codes)
                    if turn:  # the first round compiles
                        times[name].append((time.perf_counter() - start) / cells * 1e3)
            plain = statistics.median(times["plain"])
            for name, values in times.items():
                beyond = statistics.median(a - b for a, b in zip(values, times["mixing"], strict=True))
                step = statistics.median(values)
                rows.append([f"{patches:,}", batch, name, step, step / plain, beyond * 1e3])
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device, K = {K.value}, median of {ROUNDS.value}")
    print(table(["patches", "batch", "method", "ms a step", "of plain", "µs beyond mixing"], rows))


if __name__ == "__main__":
    app.run(main)
