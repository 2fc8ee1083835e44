"""Measures what neighbours that are followed from position to position could replace of the searches by hidden state.

python benchmarks/following.py [--scenes=100] [--every=2,4,8] [--farther=0.02,0.05,0.1,0.2]

RetoMaton (arXiv 2201.12431) lets the neighbours of one position name candidates for the next: the patch that follows
each of them in its own image. Test scenes are read teacher-forced, with the store and the method ``gated`` of
``configs/emoji_knowledge.py``. "every R" searches at every R-th position; "farther D" searches where the nearest
followed patch is farther than D, a squared distance. All other positions have the followed patches as neighbours,
with their distances to the state there. A search leaves out what ``copy_share`` forbids, following does not. Columns:
the share of positions without a search; the share of the searched neighbours' weight, softmax(−d/τ), that the
followed ones hold; bits per code of both groups of scenes.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from arrag_jax.config import DrawConfig
from arrag_jax.errors import run_command
from arrag_jax.evaluation.benchmarks import open_benchmark
from arrag_jax.evaluation.likelihood import Scored, bits_of_codes, look_up, score_scenes
from arrag_jax.evaluation.pipeline import open_pipeline
from arrag_jax.figures.grids import table
from arrag_jax.ops.keys import KEY_KINDS
from arrag_jax.ops.keys.hidden import project
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.parsing import parse

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "emoji_knowledge.py"
METHOD, BATCH = "gated", 50
SCENES = flags.DEFINE_integer("scenes", 100, "test scenes of the two groups")
EVERY = flags.DEFINE_list("every", ["2", "4", "8"], "positions from one search to the next")
FARTHER = flags.DEFINE_list(
    "farther", ["0.02", "0.05", "0.1", "0.2"], "squared distances above which a position searches"
)


class Followed:
    """Neighbours of the positions of images, searched at some of them and followed at the others.

    Args:
      searched: neighbours of every position, [B T K] in each field.
      queries: projected states, [B T E].
      keys: keys of all stored positions, [N T E].
      codes: codes of all stored positions, [N T].
    """

    def __init__(self, searched: Neighbors, queries: np.ndarray, keys: np.ndarray, codes: np.ndarray):
        self.searched, self.queries, self.keys, self.codes = searched, queries, keys, codes

    def walk(self, searches) -> tuple[Neighbors, np.ndarray]:
        """Returns neighbours of every position, and where they were searched [B T].

        Args:
          searches: from a position and the followed neighbours to which images search there, bool [B].
        """
        length, steps, made = self.codes.shape[1], [], []
        for position in range(self.queries.shape[1]):
            found = Neighbors(*(field[:, position] for field in self.searched))
            here = np.ones(len(found.id), bool)
            if steps:
                image, place = np.divmod(steps[-1].id, length)
                follows = (steps[-1].id >= 0) & (place + 1 < length)
                followed = self.patches(np.where(follows, image, -1), np.where(follows, place + 1, 0), position)
                here = searches(position, followed) | ~follows.any(1)
                found = Neighbors(*(np.where(here[:, None], x, y) for x, y in zip(found, followed, strict=True)))
            steps.append(found)
            made.append(here)
        return Neighbors(*(np.stack(field, 1) for field in zip(*steps, strict=True))), np.stack(made, 1)

    def patches(self, image: np.ndarray, place: np.ndarray, position: int) -> Neighbors:
        """Returns the stored patches at these images and places [B K], nearest to the query of a position first."""
        none, held = image < 0, np.maximum(image, 0)
        distance = ((self.keys[held, place] - self.queries[:, position, None]) ** 2).sum(-1, dtype=np.float32)
        order = np.argsort(np.where(none, np.inf, distance), 1, kind="stable")
        fields = self.codes[held, place], distance, held * self.codes.shape[1] + place
        empty = -1, np.inf, -1
        cut = (np.take_along_axis(np.where(none, e, x), order, 1) for x, e in zip(fields, empty, strict=True))
        return Neighbors(*(x.astype(y.dtype) for x, y in zip(cut, self.searched, strict=True)))


def main(_: list[str]) -> None:
    """Prints the table."""
    values = runpy.run_path(str(CONFIG))["get_config"]()
    values.retrieval.search = "dense"
    pipeline = open_pipeline(parse(DrawConfig, values), ("plain", METHOD))
    benchmark = open_benchmark("emoji_scenes", pipeline.config.data, "test")
    groups = list(benchmark.groups(3 * SCENES.value))
    known = [i for i, group in enumerate(groups) if group is not None][: SCENES.value]
    held_out = benchmark.held_out(known[-1] + 1)
    opened, temperature = pipeline.search_of(METHOD), pipeline.policy(METHOD).temperature
    records, projection = opened.store.records("hidden"), opened.store.table("hidden")
    stored = opened.store.codes.reshape(opened.store.num_images, -1)
    kind = KEY_KINDS["hidden"]
    keys = kind.decoded(kind.held(records, projection.shape[1]), projection)
    graph, state = nnx.split(pipeline.model)
    project_states = jax.jit(lambda s, x, c: project(jnp.asarray(projection), nnx.merge(graph, s).states(x, c)))
    ways = {"plain": None, "search": lambda position, followed: np.ones(len(followed.id), bool)}
    for every in map(int, EVERY.value):
        ways[f"every {every}"] = lambda position, followed, n=every: np.full(len(followed.id), position % n == 0)
    for most in map(float, FARTHER.value):
        ways[f"farther {most}"] = lambda position, followed, most=most: followed.distance[:, 0] > most
    figures: dict = {name: [] for name in ways}
    for start in range(0, len(known), BATCH):
        part = known[start : start + BATCH]
        (found,) = look_up(pipeline.model, pipeline.text, [held_out[i] for i in part], opened.retriever, BATCH)
        (scored,) = score_scenes(pipeline.model, [found])
        shape = (len(part), -1, found.neighbors.id.shape[1])
        searched = Neighbors(*(np.asarray(field).reshape(shape) for field in found.neighbors))
        queries = np.asarray(project_states(state, found.condition, found.codes))
        followed = Followed(searched, queries, keys, stored)
        for name, searches in ways.items():
            neighbors, made, held = searched, np.zeros(queries.shape[:2], bool), np.zeros(queries.shape[:2])
            if searches:
                neighbors, made = followed.walk(searches)
                held = weight_held(searched, neighbors, temperature)
            flat = Neighbors(*(field.reshape(-1, shape[2]) for field in neighbors))
            policy = lambda captions, name=name: pipeline.policy(METHOD if ways[name] else "plain", captions)  # noqa: E731
            (bits,) = bits_of_codes([Scored(scored.codes, scored.log_p, flat, found.captions)], policy)
            figures[name] += zip(1 - made.mean(1), held.mean(1), bits.reshape(len(part), -1).mean(1), strict=True)
    of = np.array([groups[i] for i in known])
    rows = []
    for name, each in figures.items():
        saved, held, bits = np.array(each).T
        rows.append([name, saved.mean(), held.mean(), *(bits[of == group].mean() for group in ("seen", "unseen"))])
    print(
        f"{jax.devices()[0].device_kind}, {opened.store.num_images:,} stored images, {len(known)} scenes, K {shape[2]}"
    )
    print(table(["", "not searched", "weight held", "bits, seen", "bits, unseen"], rows, digits=3))


def weight_held(searched: Neighbors, followed: Neighbors, temperature: float) -> np.ndarray:
    """Returns the share of the searched neighbours' weight that is at patches among the followed ones, [B T].

    It is 1 where nothing was found.
    """
    found = np.isfinite(searched.distance)
    nearest = np.where(found[..., :1], searched.distance[..., :1], 0)
    weight = np.where(found, np.exp(-(np.where(found, searched.distance, 0) - nearest) / temperature), 0)
    common = [
        [np.isin(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(searched.id, followed.id, strict=True)
    ]
    all_of = weight.sum(-1)
    return np.where(all_of > 0, (weight * np.array(common)).sum(-1) / np.maximum(all_of, 1e-30), 1)


if __name__ == "__main__":
    app.run(lambda argv: run_command(main, argv))
