"""Prompts of a LlamaGen: a class number, or a caption whose text features are looked up in a file or computed."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Float, Int

from arrag_jax.errors import UserError
from arrag_jax.files import atomic_write
from arrag_jax.models.t5 import T5Features

FEATURES = "features.npz"  # captions with precomputed features
T5 = "t5"  # folder of the T5 encoder
KEPT = 128  # captions whose computed features stay in memory; at flan-t5-xl's width one takes a megabyte


class ClassNumbers:
    """Encodes prompts that are class numbers, such as "207"."""

    def __init__(self, classes: int):
        self.classes = classes

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Int[np.ndarray, " B"]:
        """Returns the classes of prompts.

        Raises:
          UserError: if a prompt is not the number of a class.
        """
        for prompt in prompts:
            if not prompt.strip().isdecimal() or int(prompt) >= self.classes:
                raise UserError(
                    f"the prompt {prompt[:60]!r} is no class: give a number from 0 to {self.classes - 1}, such as 207"
                )
        return np.array([int(prompt) for prompt in prompts], np.int32)

    def length(self, prompts: Sequence[str]) -> int:
        """Returns 1, because a class is one token. Raises UserError where a prompt is not a class."""
        self(prompts)
        return 1


class CaptionEncoder:
    """Encodes captions as T5 features, which are padded on the left.

    Captions in ``features.npz`` have their features there (see ``save_features``). The features of other captions are
    computed by the T5 encoder in the folder ``t5``, which the ``transformers`` library runs. Those of the newest ones
    are kept, because the images of one prompt are usually drawn one after the other.
    """

    def __init__(self, directory: Path, width: int, length: int):
        """Opens the model folder ``directory``; the features of a caption are float [length, width].

        Raises:
          UserError: if the folder has neither ``features.npz`` nor ``t5``, or the file is damaged or for another model.
        """
        self.t5, self.width, self.tokens = directory / T5, width, length
        self._compute = T5Features(self.t5, length)
        file = directory / FEATURES
        if not file.is_file() and not self.t5.is_dir():
            raise UserError(
                f"{directory} has nothing that turns captions into text features: put a T5 encoder (flan-t5-xl of the "
                f"published models) into {self.t5}, or features of your captions into {file}"
            )
        self.stored = _read_features(file, width, length) if file.is_file() else {}
        self.computed: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # the newest last

    def length(self, prompts: Sequence[str]) -> int:
        """Returns the tokens of every caption. Raises UserError where one is empty, or has no features and no T5."""
        for prompt in prompts:
            if not prompt.strip():
                raise UserError("a prompt is empty; say what to draw")
        absent = next((prompt for prompt in prompts if prompt not in self.stored), None)
        if absent is not None and not self.t5.is_dir():
            raise UserError(
                f"{FEATURES} has no features of the prompt {absent[:60]!r}; it holds {len(self.stored)} captions: add "
                f"it, or put a T5 encoder into {self.t5}"
            )
        return self.tokens

    def __call__(
        self, prompts: Sequence[str], length: int | None = None
    ) -> tuple[Float[np.ndarray, "B T C"], Bool[np.ndarray, "B T"]]:
        """Returns features and mask of prompts, padded on the left to ``length`` tokens (None = the model's maximum).

        Raises:
          UserError: if a prompt is empty or longer than ``length``, a prompt has no stored features and there is no T5,
            or the T5 does not fit this model.
        """
        self.length(prompts)
        found = {prompt: row for prompt in prompts if (row := self.stored.get(prompt, self.computed.get(prompt)))}
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if fresh:
            features, mask = self._compute(fresh)
            if features.shape[2] != self.width:
                raise UserError(
                    f"{self.t5} gives features of {features.shape[2]} numbers, the model takes {self.width}"
                )
            found |= dict(zip(fresh, zip(features, mask, strict=True), strict=True))
            newest = list((self.computed | {prompt: found[prompt] for prompt in fresh}).items())[-KEPT:]
            self.computed = dict(newest)
        wanted = self.tokens if length is None else length
        rows = [found[prompt] for prompt in prompts]
        for prompt, (_, mask) in zip(prompts, rows, strict=True):
            if mask.sum() > wanted or wanted > self.tokens:
                raise UserError(f"prompt too long: {mask.sum()} tokens, at most {wanted}: {prompt[:60]!r}…")
        return np.stack([x[-wanted:] for x, _ in rows]), np.stack([mask[-wanted:] for _, mask in rows])


def save_features(
    path: Path, prompts: Sequence[str], features: Float[np.ndarray, "N T C"], mask: Bool[np.ndarray, "N T"]
) -> None:
    """Writes the file of captions and their left-padded features that ``CaptionEncoder`` reads."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, prompts=np.array(prompts, np.str_), features=features, mask=mask)


def _read_features(path: Path, width: int, length: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns caption → (features, mask), both padded on the left to ``length``."""
    try:
        with open(path, "rb") as file:
            prompts, features, mask = _arrays(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz of prompts, features and mask ({error}); write it again") from error
    count, most = len(prompts), min(length, features.shape[1] if features.ndim == 3 else 0)
    if prompts.dtype.kind != "U" or prompts.ndim != 1 or features.shape != (count, most, width):
        raise UserError(
            f"{path} must hold {count} prompts and features of [{count}, T <= {length}, {width}], got {features.shape}"
        )
    marked = mask.astype(bool)
    if mask.shape != features.shape[:2] or (mask != marked).any() or not marked.any(1).all():
        raise UserError(f"{path}: its mask must hold 0 and 1, {features.shape[:2]}, and a 1 in every row")
    if not np.issubdtype(features.dtype, np.floating) or not np.isfinite(features).all():
        raise UserError(f"{path}: its features must be finite floats")
    pads = ((0, 0), (length - most, 0))
    features, marked = np.pad(features.astype(np.float32), (*pads, (0, 0))), np.pad(marked, pads)
    order = np.argsort(marked, axis=1, kind="stable")  # moves pads on the right to the left
    features, marked = np.take_along_axis(features, order[..., None], 1), np.take_along_axis(marked, order, 1)
    features = np.where(marked[..., None], features, 0)
    return {str(prompt): (x, row) for prompt, x, row in zip(prompts, features, marked, strict=True)}


def _arrays(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as content:
        return content["prompts"], content["features"], content["mask"]
