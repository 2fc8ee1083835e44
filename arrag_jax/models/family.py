"""The interface of a model family, through which all other code uses it. ``registry`` lists the families."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jax.sharding import Mesh

from arrag_jax.interfaces import ArrayLike, ImageModel, ImageTokenizer, PromptEncoder
from arrag_jax.models.layouts import Layout
from arrag_jax.models.tensor_files import Stored
from arrag_jax.models.vq_images import VQImages


@runtime_checkable
class ModelConfig(Protocol):
    """The shape of a model, as its ``config.json`` describes it; a frozen dataclass."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...  # height and width in pixels

    @property
    def blended_neighbors(self) -> int: ...  # K of FAiD's blenders; 0 = the model has none


@runtime_checkable
class SavedEncoder(PromptEncoder, Protocol):
    """A prompt encoder that can be saved in the folder of a model that was trained with it."""

    def save(self, directory: str | Path) -> None:
        """Writes the files that ``Family.prompts`` reads."""
        ...

    @property
    def vocabulary(self) -> Mapping[str, int]: ...  # row of the text embedding by token


@dataclasses.dataclass(frozen=True)
class Training:
    """Functions that make untrained models of a family.

    Attributes:
      tokenizer: takes a preset; returns an untrained image tokenizer.
      text: takes captions; returns a prompt encoder for their words.
      prior: takes a preset, an image tokenizer, a prompt encoder and the length of prompts in tokens; returns an
        untrained backbone with the tokenizer, which is frozen. Raises UserError if they do not fit together.
    """

    tokenizer: Callable[[Any, nnx.Rngs], VQImages]
    text: Callable[[Iterable[str]], SavedEncoder]
    prior: Callable[[Any, Any, Any, int, nnx.Rngs], ImageModel]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: how its checkpoint folders are recognised, read, written and converted.

    Attributes:
      model_types: values of ``model_type`` in a ``config.json`` of this family.
      kind: class of the models.
      read_config: takes a folder; returns the shape of its model.
      load: takes a folder, a dtype, a grid (None = the folder's own), a mesh (None = one device), and whether the
        decoder holds its linear layers in int8; returns the model.
      load_tokenizer: takes a folder; returns its image tokenizer alone, in float32.
      save: takes a model, a folder and a dtype; writes the model.
      prompts: takes a folder; returns the prompt encoder of its model.
      open: takes a folder and the names of further files with tensors; returns the abstract model with all parts that
        the folder holds (shapes without numbers), its layout, and its tensors by key. ``convert`` uses it.
      layout_of: takes the content of a ``config.json``; returns the layout of the tensors in the same folder.
      layouts: name of a conversion target → layout that ``convert`` writes; "ours" is the layout of ``save``.
      to_json: takes the shape of a model; returns the ``config.json`` that ``save`` writes.
      presets: name → shape.
      recognises: takes the content of a ``config.json`` whose ``model_type`` no family knows; returns whether it
        belongs to this family.
      files: names or patterns of further files of weights that a folder may hold.
      training: how models are trained from scratch; None = models of this family are only read.
    """

    model_types: tuple[str, ...]
    kind: type[nnx.Module]
    read_config: Callable[[Path], ModelConfig]
    load: Callable[[Path, str, ArrayLike, Mesh | None, bool], ImageModel]
    load_tokenizer: Callable[[Path], ImageTokenizer]
    save: Callable[[Any, Path, str], None]
    prompts: Callable[[Path], PromptEncoder]
    open: Callable[[Path, tuple[str, ...]], tuple[nnx.Module, Layout, dict[str, Stored]]]
    layout_of: Callable[[dict[str, Any]], Layout]
    layouts: Mapping[str, Layout]
    to_json: Callable[[Any], dict[str, Any]]
    presets: Mapping[str, ModelConfig]
    recognises: Callable[[dict[str, Any]], bool] = lambda config: False
    files: tuple[str, ...] = ()
    training: Training | None = None
