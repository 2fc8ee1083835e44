"""What the rest of the code needs to know about one kind of model; ``registry`` lists the kinds that there are."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from arrag_jax.interfaces import ArrayLike, ImageModel, ImageTokenizer, PromptEncoder
from arrag_jax.models.layouts import Layout
from arrag_jax.models.tensor_files import Stored
from arrag_jax.models.vq_images import VQImages


@runtime_checkable
class ModelConfig(Protocol):
    """The shape of a model, read from its ``config.json`` alone; a frozen dataclass."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...  # height and width in pixels

    @property
    def blended_neighbors(self) -> int: ...  # K of FAiD's blenders; 0: it has none


@runtime_checkable
class SavedEncoder(PromptEncoder, Protocol):
    """A prompt encoder that can be written beside a model that was trained with it."""

    def save(self, directory: str | Path) -> None:
        """Writes what ``Family.prompts`` reads."""
        ...


@dataclasses.dataclass(frozen=True)
class Training:
    """How a family's models begin to be trained.

    Attributes:
      tokenizer: from a preset, a fresh image tokenizer.
      text: from captions, the prompt encoder of their words.
      prior: from a preset, an image tokenizer, that encoder and the length of prompts in tokens, a fresh
        backbone around the tokenizer, which is frozen; a UserError where they do not fit together.
    """

    tokenizer: Callable[[Any, nnx.Rngs], VQImages]
    text: Callable[[Iterable[str]], SavedEncoder]
    prior: Callable[[Any, Any, Any, int, nnx.Rngs], ImageModel]


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model: how its folders are recognised, read, written and converted.

    Attributes:
      model_types: values of ``model_type`` in its ``config.json``.
      kind: class of its models.
      recognises: whether a ``config.json``, whose ``model_type`` no family knows, is one of its.
      read_config: the shape of the model in a folder.
      load: the model in a folder, in a dtype, over a grid (None: the folder's).
      load_tokenizer: the image tokenizer alone in a folder, in float32.
      save: writes a model into a folder, in a dtype.
      prompts: the prompt encoder of the model in a folder.
      open: for ``convert``: all of the model that a folder holds, shapes without numbers; its layout; and its tensors,
        looked for in the files named last, too.
      layout_of: the layout of the tensors beside a ``config.json``.
      layouts: those that ``convert`` writes, by the name of a target; "ours" is that of ``save``.
      to_json: the ``config.json`` that ``save`` writes for the shape of a model.
      presets: shapes by name.
      files: further files of weights in a folder, where they are there.
      training: None: its models are only read.
    """

    model_types: tuple[str, ...]
    kind: type[nnx.Module]
    read_config: Callable[[Path], ModelConfig]
    load: Callable[[Path, str, ArrayLike], ImageModel]
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
