"""What a FAiD training step costs: blenders in the cheap form, window by window, and left out.

python benchmarks/faid_step.py            # hidden 512, 4 layers, a blender in every second
python benchmarks/faid_step.py --case=1b --forms=fast,none --dtype=bfloat16  # Janus-Pro-1B's shape

A step is forward and backward of one image (24 x 24 codes, K = 10), gradients of LoRA, blenders, norms and head, as
``training/faid.py`` trains them; random weights. ``--dtype`` is that of the computation and of the frozen base;
what is trained stays in float32. Every form runs in a process of its own; peak memory is that process's largest
resident set. Window by window ("naive") takes minutes and more memory at the 1B shape.
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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from arrag_jax.models.janus import Janus
from arrag_jax.models.presets import PRESETS
from arrag_jax.nn.faid import Blended, Blender, FaidConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.transformer import LlamaConfig
from arrag_jax.nn.variables import Adapter
from arrag_jax.ops.grid import has_context
from arrag_jax.training.faid import mark_adapters

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import naive_blend

BASE = PRESETS["janus-pro-1b"]
CASES = {
    "small": dataclasses.replace(
        BASE,
        language=LlamaConfig(vocab_size=102400, width=512, layers=4, heads=8, kv_heads=8, mlp=1408),
        head_width=512,
        faid=FaidConfig(stride=2),
    ),
    "1b": dataclasses.replace(BASE, faid=FaidConfig(stride=12)),
}
LORA = {"small": LoraConfig(rank=128, dropout=0.0), "1b": LoraConfig(rank=128, dropout=0.0)}
FORMS = ("fast", "naive", "none")
PROMPT = 32


def naive_map(self: Blender, hidden, features) -> Blended:
    """``Blender.blend_map``, window by window."""
    complete = jnp.asarray(has_context(*hidden.shape[1:3]))[None, :, None, None]
    kernels, weights = self.kernels()
    enter, leave = self.gate
    gate = lambda x: jax.nn.sigmoid(leave(jax.nn.relu(enter(x))))  # noqa: E731
    value = naive_blend.blend(
        kernels,
        weights,
        gate,
        hidden,
        jnp.where(complete, self.norm(features), 0) * self.norm_scale[...][None, None, None],
    )
    return Blended(value.mean(-2), value, jnp.zeros(()))


def make_model(case: str, dtype: str) -> Janus:
    """A random model, ready to be fine-tuned. numpy fills it: nothing has to be compiled."""
    config, rng = CASES[case], np.random.default_rng(0)

    def build() -> Janus:
        model = Janus(config, nnx.Rngs(0), ("language_model", "gen_embed", "gen_aligner", "gen_head"))
        for layer in model.language_model.layers:
            layer.attention.add_lora(LORA[case], nnx.Rngs(0))
        return model

    model = nnx.eval_shape(build)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        inputs = value.shape[-1] if path[-1] == "weight" else np.prod(value.shape[:-1])
        scale = np.float32({"bias": 0.1, "scale": 0.2, "norm_scale": 0.2}.get(path[-1], inputs**-0.5))
        numbers = rng.standard_normal(value.shape, np.float32) * scale
        value.set_value(jnp.asarray(numbers + np.float32(path[-1].endswith("scale")), dtype))
    mark_adapters(model)
    return model


def measure(case: str, form: str, steps: int, dtype: str) -> dict[str, float]:
    """Median seconds and peak GiB of a step; the loss, to compare forms by."""
    if form == "naive":
        Blender.blend_map = naive_map
    model, rng = make_model(case, dtype), np.random.default_rng(1)
    graph, adapters, frozen = nnx.split(model, Adapter, ...)
    adapters = jax.tree.map(lambda x: x.astype(jnp.float32), adapters)
    del model
    cells, size = BASE.grid[0] * BASE.grid[1], BASE.vision.codebook_size
    ids = jnp.asarray(rng.integers(0, 1000, (1, PROMPT)), jnp.int32)
    codes = jnp.asarray(rng.integers(0, size, (1, cells)), jnp.int32)
    neighbors = jnp.asarray(rng.integers(0, size, (1, cells, 10)), jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def step(adapters, frozen):
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), adapters), frozen)
        found = None if form == "none" else neighbors
        logits = model.teacher_forced(ids, jnp.ones(ids.shape, bool), codes, found)
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    seconds = []
    for _ in range(steps + 1):  # the first one compiles
        start = time.perf_counter()
        loss, grads = jax.block_until_ready(step(adapters, frozen))
        seconds.append(time.perf_counter() - start)
        norm = float(optax.global_norm(grads))
        del grads
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(seconds[1:]), "gib": peak, "loss": float(loss), "grad_norm": norm}


def main() -> None:
    """Prints a table, one row a form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="small")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a form")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.case, args.forms, args.steps, args.dtype)))
        return
    # Freshly mapped pages cost a tenth of a step; large ones cost less.
    results, env = {}, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for form in args.forms.split(","):
        command = [
            sys.executable,
            __file__,
            "--child",
            f"--case={args.case}",
            f"--forms={form}",
            f"--steps={args.steps}",
            f"--dtype={args.dtype}",
        ]
        results[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    print(f"{args.case}, {args.dtype}: {jax.devices()[0].device_kind}, median of {args.steps} steps\n")
    print("| blenders | s a step | of it blenders | peak GiB | loss | gradient norm |\n" + "| --- |" + " ---: |" * 5)
    bare = results.get("none", {}).get("seconds", float("nan"))
    for form, row in results.items():
        print(
            f"| {form} | {row['seconds']:.2f} | {row['seconds'] - bare:.2f} | {row['gib']:.2f} "
            f"| {row['loss']:.5f} | {row['grad_norm']:.5f} |"
        )


if __name__ == "__main__":
    main()
