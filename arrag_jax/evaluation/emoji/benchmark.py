"""The benchmark ``emoji_scenes``: its prompts describe scenes, and images are scored by the sprites in them.

The data set decides which world the scenes are of; see ``data.emoji.worlds``.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from arrag_jax.config import DataSetConfig
from arrag_jax.data.emoji.dataset import WORLDS, load_source
from arrag_jax.data.emoji.scenes import Scene, group, rarest, render, scene
from arrag_jax.data.emoji.worlds import FAMILIES, STANDARD
from arrag_jax.evaluation.emoji.object_score import family_scores, verdicts
from arrag_jax.evaluation.intervals import bootstrap
from arrag_jax.evaluation.tables import interval_text, mean_and_std
from arrag_jax.figures import grids
from arrag_jax.interfaces import ImageBatch

RANGES = ((0, 0), (1, 14), (15, 19), (20, 30), (31, 16_928))  # of training scenes, for the score of rare classes
TUNING = 1_000_000  # the first scene of "tuning" among those of the test split


class EmojiScenes:
    """A split of ``emoji_scenes``; see ``interfaces.Benchmark``.

    The split "tuning" has prompts as "test", but other ones, and no examples: it is for settings that drawn images
    decide.
    """

    splits = ("test", "valid", "tuning")
    images_per_prompt = 3
    score_name = "object_score"

    def __init__(self, data: DataSetConfig, split: str):
        self._data, self._split = data, split
        self._world = WORLDS.get(data.source, STANDARD)
        first, of = (TUNING, "test") if split == "tuning" else (0, split)
        self._scene = functools.cache(lambda number: scene(of, first + number, world=self._world))

    def prompts(self, number: int) -> Sequence[str]:
        """Returns the captions of the first scenes; any number of them can be requested."""
        return [scene.caption for scene in self._scenes(range(number))]

    def true_images(self, numbers: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n 48 48 3"]:
        """Returns the rendered scenes."""
        return np.stack([render(scene) for scene in self._scenes(numbers.tolist())])

    def held_out(self, number: int) -> Sequence[Mapping[str, Any]]:
        """Returns the first scenes of the split, in the form of the data set; none of "tuning".

        Raises:
          UserError: if the data set holds fewer.
        """
        if self._split == "tuning":
            return []
        return load_source(self._data.source, f"{self._split}[:{number}]", self._data.data_dir)

    def groups(self, number: int) -> Sequence[str | None]:
        """Returns how far training has shown what the scenes ask for (``data.emoji.scenes.group``)."""
        return [group(scene, self._world) for scene in self._scenes(range(number))]

    def score(self, repeats: Iterable[Iterable[ImageBatch]]) -> dict[str, Any]:
        """Returns the object score: mean and spread over the repeats, and the means of some groups of prompts.

        "families": the mean of each family. "held_out_pairs" and "other_prompts": the means of prompts with and without
        pairs that training leaves out; null if there are no such prompts. "groups": the mean of each group that occurs
        (see ``groups``). "training_scenes": in a long-tailed world, mean and interval by ``RANGES`` of the number of
        training scenes that show the prompt's rarest class. "verdicts": 1 for each image that shows what its prompt
        says, else 0.
        """
        right: list[np.ndarray] = []
        scenes: list[Scene] = []
        for batches in repeats:
            scenes, parts = [], []
            for numbers, images in batches:
                shown = self._scenes(numbers.tolist())
                parts.append(verdicts(images, shown, self._world))
                scenes += shown
            right.append(np.concatenate(parts))
        results = [family_scores(row, scenes) for row in right]
        verdict = np.stack(right)  # [repeats prompts]
        held_out = np.array([scene.held_out for scene in scenes])
        groups = np.array([group(scene, self._world) for scene in scenes])
        return {
            **mean_and_std([result["overall"] for result in results]),
            "families": {
                name: float(np.mean([result["families"][name] for result in results]))
                for name in results[0]["families"]
            },
            "held_out_pairs": float(verdict[:, held_out].mean()) if held_out.any() else None,
            "other_prompts": None if held_out.all() else float(verdict[:, ~held_out].mean()),
            "groups": {
                name: float(verdict[:, groups == name].mean()) for name in self._world.group_names if name in groups
            },
            "training_scenes": self._by_training_scenes(verdict, scenes),
            "verdicts": verdict.astype(int).tolist(),
        }

    def _by_training_scenes(
        self, verdict: Int[np.ndarray, "R P"] | Bool[np.ndarray, "R P"], scenes: Sequence[Scene]
    ) -> dict[str, dict[str, float]]:
        """Returns the mean of each range of ``RANGES`` that occurs, with its 95 % interval over prompts."""
        if not self._world.train_scenes:
            return {}
        counts = np.array([self._world.train_scenes[rarest(scene, self._world)] for scene in scenes])
        inside = {f"{low} to {high}": (counts >= low) & (counts <= high) for low, high in RANGES}
        found = {name: bootstrap(verdict[:, here].astype(np.float64)) for name, here in inside.items() if here.any()}
        return {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in found.items()}

    def table(self, scores: Mapping[str, Mapping[str, Any]]) -> str:
        """Returns a table with one row per method: mean, spread and the groups of prompts.

        In a long-tailed world a second table holds the scores by training scenes.
        """
        groups = self._world.group_names
        columns = ["object score", "mean", "spread", *FAMILIES, "other prompts", "held-out pairs", *groups]
        rows = [
            [
                name, row["mean"], row["std"], *(row["families"].get(family) for family in FAMILIES),
                row["other_prompts"], row["held_out_pairs"], *(row["groups"].get(name) for name in groups),
            ]
            for name, row in scores.items()
        ]  # fmt: skip
        tables = [grids.table(columns, rows, digits=3)]
        ranges = list(next(iter(scores.values()))["training_scenes"])
        if ranges:
            shown = {name: row["training_scenes"] for name, row in scores.items()}
            cells = [[name, *(interval_text(row[each]) for each in ranges)] for name, row in shown.items()]
            tables.append(grids.table(["by training scenes", *ranges], cells))
        return "\n\n".join(tables)

    def _scenes(self, numbers: Iterable[int]) -> list[Scene]:
        return [self._scene(number) for number in numbers]
