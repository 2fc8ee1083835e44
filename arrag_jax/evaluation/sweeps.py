"""Bits per code as a function of DAiD's settings, and of the size of the store."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_jax import progress
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.evaluation.likelihood import bits_per_code, look_up, score_scenes
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.figures import grids
from arrag_jax.files import write_json
from arrag_jax.retrieval.load import load_retriever

SPLIT = "valid"  # the split on which settings are chosen
NEEDED = ("plain", "daid")  # the methods that a pipeline must have
WEIGHTS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # λ of the sweep
TEMPERATURES = (0.001, 0.003, 0.01, 0.03, 0.1)  # τ of the sweep
NEIGHBORS = (16, 128, 1024)  # K of the sweep


def sweep(pipeline: Pipeline, source: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Returns a table of the best settings: gain in bits per code over λ and τ, for each K and reduction.

    Also writes ``sweep.json`` and the heat maps ``sweep_REDUCTION_kK.png``.
    """
    config = dataclasses.replace(pipeline.config.retrieval, k=max(NEIGHBORS))
    _, retriever = load_retriever(config, pipeline.datastore.settings.fingerprint)
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
            title=f"gain in bits per code, reduction: {reduction}, K = {k}",
            row_name="weight", column_name="temperature", form="{:+.4f}",
        )  # fmt: skip
        grids.save(out / f"sweep_{reduction}_k{k}.png", page)
        best = np.unravel_index(gain.argmax(), gain.shape)
        rows.append([reduction, k, WEIGHTS[best[0]], TEMPERATURES[best[1]], float(gain.max())])
        records.append({"reduction": reduction, "k": k, "gain": gain.tolist()})
    settings = {"plain": plain, "weights": WEIGHTS, "temperatures": TEMPERATURES, "maps": records}
    write_json(out / "sweep.json", settings)
    return grids.table(["reduction", "K", "best weight", "best temperature", "gain in bits per code"], rows, digits=4)


def scaling(pipeline: Pipeline, source: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the gain in bits per code for growing parts of the store, up to the whole store."""
    config, total = pipeline.config.retrieval, pipeline.datastore.num_images
    examples, rows = [source[i] for i in range(len(source))], []
    for size in sorted({total // 4**i for i in range(5)} - {0}):
        part = dataclasses.replace(config, num_images=size)
        store, retriever = load_retriever(part, pipeline.datastore.settings.fingerprint)
        scored = score_scenes(pipeline.model, look_up(pipeline.model, pipeline.text, examples, retriever))
        plain, daid = bits_per_code(scored, Plain()), bits_per_code(scored, pipeline.policy("daid"))
        rows.append([size, store.num_patches, plain, daid, plain - daid])
    return grids.table(["stored images", "patches", "plain", "DAiD", "gain in bits per code"], rows, digits=4)
