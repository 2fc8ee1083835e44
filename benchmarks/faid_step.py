"""Measures the cost of a FAiD training step: with blenders in the fast form, window by window, and without blenders.

python benchmarks/faid_step.py            # hidden 512, 4 layers, a blender in every second
python benchmarks/faid_step.py --case=1b --forms=fast,none --dtype=bfloat16  # Janus-Pro-1B's shape

A step is the forward and backward pass of ``--images`` images (24 x 24 codes, K = 10), with gradients of LoRA,
blenders, norms and head as in ``training/faid.py``. The weights are random. ``--dtype`` is the dtype of the computation
and of the frozen base; trained parameters stay in float32. Every form runs in its own process. Peak memory is that of
the device if JAX reports it, else the process's largest resident set. The blenders' share of a step is computed from
the difference to "none". The form window by window ("naive") takes minutes and more memory at the 1B shape.
"""

import argparse
import dataclasses
import json
import os
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
from rooflines import bytes_of, flops_of

from arrag_jax.models.janus import Janus
from arrag_jax.models.presets import PRESETS
from arrag_jax.nn.faid import Blender, FaidConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.lora import LoraConfig
from arrag_jax.nn.variables import Adapter
from arrag_jax.training.faid import mark_adapters
from arrag_jax.training.metrics import peak_memory_gib

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import naive_blend

BASE, EMOJI = PRESETS["janus-pro-1b"], PRESETS["janus-emoji"]
WORDS = 1000  # from which prompts are drawn
CASES = {
    "small": dataclasses.replace(
        BASE,
        language=LlamaConfig(vocab_size=102400, width=512, layers=4, heads=8, kv_heads=8, mlp=1408),
        head_width=512,
        faid=FaidConfig(stride=2),
    ),
    "1b": dataclasses.replace(BASE, faid=FaidConfig(stride=12)),
    "emoji": dataclasses.replace(
        EMOJI, language=dataclasses.replace(EMOJI.language, vocab_size=WORDS), faid=FaidConfig(stride=3)
    ),
}
LORA = {name: LoraConfig(rank=32 if name == "emoji" else 128, dropout=0.0) for name in CASES}
FORMS = ("fast", "naive", "none")
PROMPT = 32


def make_model(case: str, dtype: str) -> Janus:
    """Returns a model with random weights, ready to be fine-tuned; numpy fills it, so nothing has to be compiled."""
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


def measure(case: str, form: str, images: int, steps: int, dtype: str) -> dict[str, float | str]:
    """Returns device, median seconds and peak GiB of a step, and loss and gradient norm, which compare the forms.

    "flops" counts its matrix products. "bytes" are those of the parameters that it reads whole and of their gradients,
    the least that it moves.
    """
    if form == "naive":
        Blender.blend_map = naive_blend.blend_map
    model, rng = make_model(case, dtype), np.random.default_rng(1)
    graph, adapters, frozen = nnx.split(model, Adapter, ...)
    adapters = jax.tree.map(lambda x: x.astype(jnp.float32), adapters)
    del model
    config = CASES[case]
    cells, size = config.grid[0] * config.grid[1], config.vision.codebook_size
    ids = jnp.asarray(rng.integers(0, WORDS, (images, PROMPT)), jnp.int32)
    codes = jnp.asarray(rng.integers(0, size, (images, cells)), jnp.int32)
    neighbors = jnp.asarray(rng.integers(0, size, (images, cells, 10)), jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def step(adapters, frozen):
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), adapters), frozen)
        found = None if form == "none" else neighbors
        logits = model.teacher_forced((ids, jnp.ones(ids.shape, bool)), codes, found)
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()

    flops, seconds = flops_of(step.lower(adapters, frozen)), []
    for _ in range(steps + 1):  # the first step compiles
        start = time.perf_counter()
        loss, grads = jax.block_until_ready(step(adapters, frozen))
        seconds.append(time.perf_counter() - start)
        norm = float(optax.global_norm(grads))
        del grads
    figures = {"seconds": statistics.median(seconds[1:]), "gib": peak_memory_gib(), "loss": float(loss), "norm": norm}
    read, trained = (
        {path: leaf for path, leaf in nnx.to_flat_state(state) if path[-1] != "embedding" and _is_used(path, form)}
        for state in (frozen, adapters)
    )
    figures |= {"flops": flops, "bytes": bytes_of((read, trained, trained))}  # gradients are as large as parameters
    return {"device": jax.devices()[0].device_kind} | figures


def _is_used(path: tuple, form: str) -> bool:
    return form != "none" or "blender" not in path


def main() -> None:
    """Prints a table with one row per form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="small")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--images", type=int, default=1, help="a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a form")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.case, args.forms, args.images, args.steps, args.dtype)))
        return
    # Mapping new memory pages takes a tenth of a step; huge pages take less.
    results, env = {}, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for form in args.forms.split(","):
        command = [
            sys.executable,
            __file__,
            "--child",
            f"--case={args.case}",
            f"--forms={form}",
            f"--images={args.images}",
            f"--steps={args.steps}",
            f"--dtype={args.dtype}",
        ]
        results[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    device = next(iter(results.values()))["device"]
    print(f"{args.case}, {args.dtype}, {args.images} images a step: {device}, median of {args.steps} steps\n")
    print("| blenders | s a step | of it blenders | images/s | peak GiB | loss | gradient norm |")
    print("| --- |" + " ---: |" * 6)
    bare = results.get("none", {}).get("seconds", float("nan"))
    for form, row in results.items():
        seconds = row["seconds"]
        print(
            f"| {form} | {seconds:.2f} | {seconds - bare:.2f} s, {1 - bare / seconds:.0%} "
            f"| {args.images / seconds:.2f} | {row['gib']:.2f} | {row['loss']:.5f} | {row['norm']:.5f} |"
        )


if __name__ == "__main__":
    main()
