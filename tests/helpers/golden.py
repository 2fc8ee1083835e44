"""Golden numbers of the official implementations: those committed, and the larger ones where they lie beside the tree.

``tests/golden/README.md`` says what they are and where they come from.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"
SEED = 1234


def find(family: str, name: str, whole: bool = False) -> Path:
    """Path of a file of a family (``dev`` or ``llamagen``): the whole one where it lies beside the tree, else the part.

    Args:
      whole: the committed part does not do; skips where the whole file is absent.
    """
    places = (SHARED / "reference" / family / name, HERE / family / name)
    found = next((place for place in places[: 1 if whole else 2] if place.exists()), None)
    if found is None:
        pytest.skip(f"not committed, and absent beside this folder: shared/reference/{family}/{name}")
    return found


def benchmark(*names: str) -> Path:
    """Path of a file of the benchmarks' golden numbers, which are not committed; skips where it is absent."""
    path = SHARED.joinpath("benchmarks", *names)
    if not path.exists():
        pytest.skip(f"not committed, and absent beside this folder: shared/benchmarks/{'/'.join(names)}")
    return path


class Normals:
    """The stream of normal numbers that a seed gives in PyTorch on a CPU, up to the last bit (Box-Muller, MT19937)."""

    def __init__(self, seed: int):
        self._random, self._kept = np.random.RandomState(seed), []

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next tensor, float32."""
        count = math.prod(shape)
        if count < 16:
            return np.array([self._one() for _ in range(count)], np.float32).reshape(shape)
        uniforms, whole = self._uniforms(count), count - count % 16
        values = np.empty(count, np.float32)
        values[:whole] = self._blocks(uniforms[:whole])
        if whole < count:  # the last sixteen are drawn again
            values[-16:] = self._blocks(self._uniforms(16))
        return values.reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self._random.randint(0, 2**32, count, dtype=np.uint32)

    def _uniforms(self, count: int) -> np.ndarray:
        return (self._words(count) & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    @staticmethod
    def _blocks(uniforms: np.ndarray) -> np.ndarray:
        """Pairs lie eight apart."""
        first, second = uniforms.reshape(-1, 2, 8).swapaxes(0, 1)
        radius, angle = np.sqrt(np.float32(-2) * np.log(1 - first)), np.float32(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)

    def _one(self) -> float:
        """Small tensors take doubles, two at a time."""
        if not self._kept:
            high, low = self._words(4).astype(np.uint64).reshape(2, 2).T
            first, second = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(float) * 2.0**-53
            radius = math.sqrt(-2 * math.log1p(-second))
            self._kept = [radius * math.sin(2 * math.pi * first), radius * math.cos(2 * math.pi * first)]
        return self._kept.pop()


def write_checkpoint(folder: Path, faid: bool) -> Path:
    """Writes the golden model as such checkpoints are published: with FAiD's blenders in two files, without in one."""
    draw, recipe, state = Normals(SEED), json.loads((HERE / "dev" / "weights.json").read_text()), {}
    for key, (shape, scale, mean) in recipe.items():
        value = np.float32(mean) + np.float32(scale) * draw(tuple(shape))
        if faid or not (".blender." in key or ".retrieval_layernorm." in key):
            state[key] = value
    state["gen_vision_model.quantize.codebook_used"] = np.zeros(65536, np.float32)
    folder.mkdir()
    shutil.copyfile(HERE / "dev" / f"{'faid' if faid else 'janus'}.json", folder / "config.json")
    if not faid:
        save_file(state, folder / "model.safetensors")
        return folder
    keys = sorted(state)
    parts = {"model-00001-of-00002": keys[: len(keys) // 2], "model-00002-of-00002": keys[len(keys) // 2 :]}
    for name, held in parts.items():
        save_file({key: state[key] for key in held}, folder / f"{name}.safetensors")
    files = {key: f"{name}.safetensors" for name, held in parts.items() for key in held}
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
