"""Search of a store that is spread over a Ray cluster: equal to the search in one process, whatever dies meanwhile."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import RayConfig, RetrievalConfig, ScannOptions
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid
from arrag_jax.models.checkpoint import load_tokenizer, save_model
from arrag_jax.retrieval.build import report
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.retrieval.remote import merged
from helpers import cluster, folders, tiny

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)")
EXHAUSTIVE = ScannOptions(exhaustive_below=2**30)
K = 16


def test_merged_answers_are_ordered_by_distance_and_then_by_row():
    rng = np.random.default_rng(0)
    distance = rng.integers(0, 4, (3, 5, 7)).astype(np.float32)
    row = np.stack([rng.permutation(105).reshape(3, 5, 7)[i] for i in range(3)]).astype(np.int32)
    distance[2, :, 4:], row[2, :, 4:] = np.inf, -1  # a share with fewer patches
    parts = []
    for each, rows in zip(distance, row, strict=True):
        order = np.lexsort((rows, each))
        each, rows = np.take_along_axis(each, order, 1), np.take_along_axis(rows, order, 1)
        parts.append((rows % 10, each, rows))
    for k in (4, 18):
        code, near, found = merged(parts, k)
        for query in range(5):
            all_of = [pair for part in parts for pair in zip(part[1][query], part[2][query], strict=True)]
            wanted = sorted(pair for pair in all_of if pair[1] >= 0)
            assert list(zip(near[query], found[query], strict=True)) == wanted[:k]
            assert (code[query] == found[query] % 10).all()
    _, near, found = merged(parts, 30)
    assert np.isinf(near[:, 18:]).all() and (found[:, 18:] == -1).all()


def make_store(folder: Path) -> None:
    """A store of equal and nearly equal contexts, whose index has three shards."""
    model = tiny.janus()
    save_model(model, folder / "model")
    source = folders.write_scenes(folder / "photos", range(23))
    for number in range(4):  # ties between shares
        (source / f"scene_{number + 50}.png").write_bytes((source / f"scene_0{number}.png").read_bytes())
    config = folders.config_in(folder)
    config = dataclasses.replace(config, keys=("codebook", "latent"), indexes=("codebook",), index_shards=3)
    config = dataclasses.replace(config, scann=EXHAUSTIVE)
    build_datastore.run(config, str(folder / "store"), keep_duplicates=True)


def compare(address: str, folder: str) -> None:
    """The driver of the next test; waits for a line between two searches."""
    home, rng = Path(folder), np.random.default_rng(0)
    tokenizer = load_tokenizer(folder + "/model")
    contexts = rng.integers(0, 9, (40, 4)).astype(np.int32)
    contexts[3, 1] = -1
    searches = []
    for keys, search in (("codebook", "ray"), ("latent", "ray_dense")):
        exact = RetrievalConfig(str(home / "store"), K, keys, "dense", scann=EXHAUSTIVE)
        spread = dataclasses.replace(exact, search=search, ray=RayConfig(address, 3))
        searches.append([load_retriever(each, tokenizer.fingerprint)[1] for each in (exact, spread)])
    ask = jax.jit(lambda retriever, context: retriever.search(context))
    for told in ("searching", "searching again"):
        for local, remote in searches:
            for x, y in zip(ask(local, contexts), ask(remote, contexts), strict=True):
                np.testing.assert_array_equal(x, y)
        print(told, flush=True)
        sys.stdin.readline()
    report(home / "store", dataclasses.replace(folders.config_in(home), scann=EXHAUSTIVE), address)
    told = json.loads((home / "store" / "report-ray-codebook.json").read_text())
    assert len(told["nodes"]) in (2, 3), told  # Ray counts a dead machine for some seconds
    assert sum(node["rows"] for node in told["nodes"]) == told["num_patches"], told
    assert all(node["bytes"] > 0 and node["ms"] > 0 for node in told["nodes"])
    model = tiny.janus()
    ids, mask = tiny.prompts((3, 2))
    drawn = [sample(model, ids, Daid(0.5, 0.1), search, prompt_mask=mask, seed=np.arange(2)) for search in searches[0]]
    for x, y in zip(*map(jax.tree.leaves, drawn), strict=True):
        np.testing.assert_array_equal(x, y)


@needs_ray
@pytest.mark.long
def test_it_is_the_local_search_though_a_machine_dies_between_two_searches(tmp_path):
    """Ids, distances and codes are equal to the bit, for every kind of key and both searches, and so is a draw."""
    make_store(tmp_path)
    said = []
    with cluster.running(3) as ray, cluster.driving("test_remote_search:compare", ray.address, str(tmp_path)) as driver:
        for line in driver.stdout:
            said.append(line)
            if line == "searching\n":
                node = next(node for node in ray.nodes[1:] if node.workers())
                node.raylet.kill()
                driver.stdin.write("\n")
                driver.stdin.flush()
            if line == "searching again\n":
                driver.stdin.write("\n")
                driver.stdin.flush()
        assert driver.wait() == 0, "".join(said)
