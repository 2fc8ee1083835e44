"""The parameters from which a run starts if its config names a model: those of another run, or of a model folder.

A model folder may know fewer words and fewer image codes than the run. Then its rows for them are taken, and the rows
for new words and codes stay random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree

from arrag_jax.errors import UserError
from arrag_jax.models.config_json import read_json
from arrag_jax.models.family import Family, SavedEncoder
from arrag_jax.models.layouts import published_shape, to_ours
from arrag_jax.models.place import run_or_model
from arrag_jax.models.registry import family_in
from arrag_jax.models.tensor_files import read_tensors, some, stored_tensors
from arrag_jax.training.checkpoint import read_params


def params_of(
    place: str, params: PyTree, best_metric: tuple[str, str], vocabulary: Mapping[str, int]
) -> tuple[PyTree, str]:
    """Returns trained parameters, laid out as ``params`` are, and a text that describes their origin.

    Args:
      place: ``TrainConfig.init_from``: the workdir of a run, or a model folder (an export, or what ``convert`` writes).
      params: the run's own parameters at step 0.
      best_metric: as for ``training.checkpoint.Checkpoints``.
      vocabulary: the run's tokens and their ids; {} if the run reads no prompts.

    Raises:
      UserError: if ``place`` is neither, or holds parameters of another model.
    """
    folder = run_or_model(place)
    if (folder / "config.json").is_file() and not (folder / "base.json").is_file():  # every run's workdir has base.json
        return _of_folder(folder, params, vocabulary), f"starting from the weights in {folder}"
    step, found = read_params(folder, params, best_metric)
    return found, f"starting from step {step} of {folder}"


def _of_folder(folder: Path, params: PyTree, vocabulary: Mapping[str, int]) -> PyTree:
    """Returns the parameters from the weights of a model folder, with the paths and shapes of ``params``.

    Raises:
      UserError: if a parameter is missing there or has another shape, or the run lacks a word or a code of the model.
    """
    family = family_in(folder)
    layout, stored = family.layout_of(read_json(folder)), stored_tensors(folder, family.files)
    leaves = {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    keys = {path: layout.key(path) for path in leaves}
    absent = sorted(key for key in keys.values() if key not in stored)
    if absent:
        raise UserError(
            f"init_from={folder} does not hold {some(absent, 3)}, which this run trains (an export's LoRA is merged: "
            "tune it further as config.options.base); give the workdir of a run of the same task"
        )
    rows = {}
    if layout.words in keys.values():
        rows[layout.words] = _rows_of_words(folder, family, stored[layout.words].shape[0], vocabulary)
    for path, leaf in leaves.items():
        key, shape, wanted = keys[path], stored[keys[path]].shape, published_shape(leaf.shape, path)
        if key in layout.per_code and shape[0] < wanted[0]:
            rows[key] = np.arange(shape[0])
        if shape != wanted and (key not in rows or shape[1:] != wanted[1:]):
            raise UserError(
                f"init_from={folder} holds parameters of another model: {key} has shape {shape}, not {wanted}; "
                "choose another run"
            )
    paths = {key: path for path, key in keys.items()}
    found = {}
    for key, value in read_tensors({key: stored[key] for key in paths}):
        found[paths[key]] = _like(leaves[paths[key]], to_ours(value, paths[key]), rows.get(key))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_dotted(path)], params)


def _rows_of_words(folder: Path, family: Family, count: int, vocabulary: Mapping[str, int]) -> Int[np.ndarray, " n"]:
    """Returns the run's row for each of the ``count`` rows of words in a model folder.

    Raises:
      UserError: if the run lacks a word of the model.
    """
    encoder = family.prompts(folder)
    words = encoder.vocabulary if isinstance(encoder, SavedEncoder) else {}
    lacking = sorted(words.keys() - vocabulary.keys())
    if lacking or len(words) != count:
        what = f"knows {some(lacking, 3)}" if lacking else f"has {count} words, and its tokenizer has {len(words)}"
        raise UserError(f"init_from={folder} holds parameters of another model: it {what}; choose another run")
    return np.array([vocabulary[word] for word in sorted(words, key=words.__getitem__)])


def _like(leaf: jax.Array, value: np.ndarray, rows: Int[np.ndarray, " n"] | None) -> jax.Array:
    """Returns the value in a leaf's dtype, sharded over the same devices as the leaf.

    ``rows``: the rows of the leaf that the value replaces; None = all.
    """
    value = np.ascontiguousarray(value.astype(leaf.dtype))
    if rows is not None:
        return jax.jit(lambda leaf: leaf.at[rows].set(value), out_shardings=leaf.sharding)(leaf)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda place: value[place])


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
