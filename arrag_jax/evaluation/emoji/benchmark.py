"""The benchmark ``emoji_scenes``: bits a code and object score of every method, over three seeds."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax import progress
from arrag_jax.data.emoji.dataset import load_source
from arrag_jax.data.emoji.scenes import FAMILIES, Scene, render, scene
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.evaluation.emoji.object_score import object_score
from arrag_jax.evaluation.likelihood import bits_per_code, look_up, score_scenes
from arrag_jax.evaluation.pipeline import LIMITED, Pipeline
from arrag_jax.figures import grids
from arrag_jax.files import write_json
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.images import reconstruct

SEEDS = 3
WEIGHTS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # λ of the sweep
TEMPERATURES = (0.001, 0.003, 0.01, 0.03, 0.1)  # τ of the sweep
NEIGHBORS = (16, 128, 1024)  # K of the sweep


def measure(pipeline: Pipeline, split: str, num_prompts: int, num_scenes: int) -> dict[str, Any]:
    """All figures of results.json.

    Args:
      split: "test", or "valid" to choose settings on.
      num_prompts: prompts drawn a seed; 0 = measure the likelihood alone.
      num_scenes: scenes whose likelihood is measured, shared out among the seeds.
    """
    return {
        "bits_per_code": likelihoods(pipeline, split, num_scenes),
        "object_score": object_scores(pipeline, split, num_prompts) if num_prompts else {},
        "split": split,
        "num_prompts": num_prompts,
        "num_scenes": num_scenes,
        "seeds": SEEDS,
        "index": pipeline.index_hash(),
        "settings": dataclasses.asdict(pipeline.config),
    }


def likelihoods(pipeline: Pipeline, split: str, num_scenes: int) -> dict[str, dict[str, Any]]:
    """Bits a code of each method; each seed has scenes of its own. "gain": below plain, where that is measured, too."""
    source = load_source(pipeline.config.data.name, f"{split}[:{num_scenes}]", pipeline.config.data.data_dir)
    bits = {method: [] for method in pipeline.methods}
    for seed in range(SEEDS):
        # Thirds of consecutive scenes: families take turns, so every SEEDS-th scene would be two families alone.
        third = range(seed * len(source) // SEEDS, (seed + 1) * len(source) // SEEDS)
        examples = [source[i] for i in third]
        found, scored = {}, {}  # methods share what one search found, and one model's distributions with it
        for method in pipeline.methods:
            model, policy = pipeline.model_of(method), pipeline.policy(method)
            search = method if method in LIMITED else ""
            if search not in found:
                limit = functools.partial(pipeline.retriever_for, method) if search else None
                found[search] = look_up(pipeline.model, pipeline.text, examples, pipeline.retriever, limit=limit)
            key = id(model), policy.blends, search
            if key not in scored:
                scored[key] = score_scenes(model, found[search], policy.blends)
            bits[method].append(bits_per_code(scored[key], policy))
    figures = {method: _mean_and_std(values) for method, values in bits.items()}
    for method in figures if "plain" in bits else ():
        figures[method]["gain"] = _mean_and_std(list(np.subtract(bits["plain"], bits[method])))
    return figures


def object_scores(pipeline: Pipeline, split: str, num_prompts: int) -> dict[str, dict[str, Any]]:
    """Object score of true scenes, of their VQ reconstructions, and of what each method draws."""
    scenes = [scene(split, i) for i in range(num_prompts)]
    truth = np.stack([render(s) for s in scenes])
    scores = {
        "true": _summary([truth], scenes),
        "reconstruction": _summary([reconstruct(pipeline.model, truth)], scenes),
    }
    for method in pipeline.methods:
        drawn = []
        for seed in range(SEEDS):
            # Far apart, so that no picture of one seed is drawn with a key of another.
            seeds = pipeline.config.seed + seed * 1_000_003 + np.arange(len(scenes))
            batches = pipeline.draw([s.caption for s in scenes], method, seeds)
            drawn.append(np.concatenate([batch.images for batch in batches]))
        scores[method] = _summary(drawn, scenes)
    return scores


def _summary(drawn: list[np.ndarray], scenes: list[Scene]) -> dict[str, Any]:
    """Mean and spread over the drawings, the families' means, and the prompts with and without held-out pairs."""
    results = [object_score(images, scenes) for images in drawn]
    right = np.stack([result["right"] for result in results])
    held_out = np.array([s.held_out for s in scenes])
    return {
        **_mean_and_std([result["overall"] for result in results]),
        "families": {name: float(np.mean([r["families"][name] for r in results])) for name in results[0]["families"]},
        "held_out_pairs": float(right[:, held_out].mean()) if held_out.any() else None,
        "other_prompts": None if held_out.all() else float(right[:, ~held_out].mean()),
    }


def _mean_and_std(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def report(results: dict[str, Any]) -> str:
    """The tables that ``eval`` prints, in Markdown."""
    bits, objects, nothing = results["bits_per_code"], results["object_score"], {"mean": None, "std": None}
    first = grids.table(
        ["bits a code", "mean", "spread", "below plain", "spread"],
        [[name, row["mean"], row["std"], *row.get("gain", nothing).values()] for name, row in bits.items()],
        digits=4,
    )
    columns = ["object score", "mean", "spread", *FAMILIES, "other prompts", "held-out pairs"]
    rows = [
        [name, r["mean"], r["std"], *(r["families"].get(f) for f in FAMILIES), r["other_prompts"], r["held_out_pairs"]]
        for name, r in objects.items()
    ]
    if not rows:
        return first
    return f"{first}\n\n{grids.table(columns, rows, digits=3)}"


def sweep(pipeline: Pipeline, num_scenes: int, out: Path) -> str:
    """Gain in bits a code over λ, τ, K and the reduction, on the validation split; a heat map a (rule, K).

    Writes ``sweep.json`` and ``sweep_RULE_kK.png``; returns the table of the best settings.
    """
    config = dataclasses.replace(pipeline.config.retrieval, k=max(NEIGHBORS))
    _, retriever = load_retriever(config, pipeline.store.settings.fingerprint)
    source = load_source(pipeline.config.data.name, f"valid[:{num_scenes}]", pipeline.config.data.data_dir)
    found = look_up(pipeline.model, pipeline.text, [source[i] for i in range(len(source))], retriever)
    scored = score_scenes(pipeline.model, found)
    plain = bits_per_code(scored, Plain())
    records, rows = [], []
    for reduction, k in progress.bar(list(itertools.product(("max", "sum"), NEIGHBORS)), desc="sweep", unit="map"):
        gain = np.array(
            [
                [plain - bits_per_code(scored, Daid(w, t, reduction), k) for t in TEMPERATURES]
                for w in WEIGHTS
            ]
        )  # fmt: skip
        page = grids.heat_map(
            gain, [f"{w:g}" for w in WEIGHTS], [f"{t:g}" for t in TEMPERATURES],
            title=f"gain in bits a code, reduction: {reduction}, K = {k}", row_name="weight", column_name="temperature",
            form="{:+.4f}",
        )  # fmt: skip
        grids.save(out / f"sweep_{reduction}_k{k}.png", page)
        best = np.unravel_index(gain.argmax(), gain.shape)
        rows.append([reduction, k, WEIGHTS[best[0]], TEMPERATURES[best[1]], float(gain.max())])
        records.append({"reduction": reduction, "k": k, "gain": gain.tolist()})
    settings = {"plain": plain, "weights": WEIGHTS, "temperatures": TEMPERATURES, "maps": records}
    write_json(out / "sweep.json", settings)
    return grids.table(["reduction", "K", "best weight", "best temperature", "gain in bits a code"], rows, digits=4)


def scaling(pipeline: Pipeline, num_scenes: int) -> str:
    """Gain in bits a code as the store grows to its full size, on the validation split; a table."""
    config, total = pipeline.config.retrieval, pipeline.store.num_images
    source = load_source(pipeline.config.data.name, f"valid[:{num_scenes}]", pipeline.config.data.data_dir)
    examples, rows = [source[i] for i in range(len(source))], []
    for size in sorted({total // 4**i for i in range(5)} - {0}):
        part = dataclasses.replace(config, num_images=size)
        store, retriever = load_retriever(part, pipeline.store.settings.fingerprint)
        scored = score_scenes(pipeline.model, look_up(pipeline.model, pipeline.text, examples, retriever))
        plain, daid = bits_per_code(scored, Plain()), bits_per_code(scored, pipeline.policy("daid"))
        rows.append([size, store.num_patches, plain, daid, plain - daid])
    return grids.table(["stored images", "patches", "plain", "DAiD", "gain in bits a code"], rows, digits=4)
