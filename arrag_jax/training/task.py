"""The interface of a training task, and the types of what goes into it and comes out."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

Batch = Mapping[str, Any]  # arrays whose first axis is the batch axis
Scalars = dict[str, Float[Array, ""]]
SampleImages = dict[str, UInt8[np.ndarray, "h w 3"]]  # by name; may be empty
Model = TypeVar("Model")


@runtime_checkable
class TaskStep(Protocol[Model]):
    """What a training task compiles: the model and its loss, without its data."""

    @property
    def trainable(self) -> type: ...  # the nnx.Variable subclass that has gradients and optimizer state

    def load(self, mesh: Mesh | None) -> PyTree:
        """Returns what ``init_model`` needs of files, laid out over the mesh (None = one device); () if nothing.

        The run's checkpoints do not contain its ``Frozen`` variables; a resumed run takes them from here again.
        """
        ...

    def init_model(self, rngs: nnx.Rngs, loaded: PyTree = None) -> Model:
        """Returns the model at step 0; it is the same on every process.

        The loop compiles this method, so that every parameter is made in its shares on the devices that hold them.

        Args:
          loaded: what ``load`` returns; None = the method loads it.
        """
        ...

    def loss(self, model: Model, batch: Batch, key: Array) -> tuple[Float[Array, ""], Scalars]:
        """Returns the loss and metrics of a batch.

        It may write non-trainable variables of the model; the step keeps their new values.
        """
        ...

    def after_update(self, model: Model, key: Array) -> None:
        """Edits the model after the optimizer's update, inside the jitted step, e.g. revives dead codes."""
        ...

    def eval_metrics(self, model: Model, batch: Batch) -> Scalars:
        """Returns the metrics of one held-out batch; the loop jits it.

        Each metric must be a mean over the batch's examples, because the loop averages the batches by their sizes.
        """
        ...


@runtime_checkable
class Task(TaskStep[Model], Protocol[Model]):
    """A training task: the model, its data, its loss and its metrics."""

    @property
    def best_metric(self) -> tuple[str, str]: ...  # held-out metric that selects the best checkpoint; "min" or "max"

    @property
    def tokens(self) -> int: ...  # tokens per training example, for the tokens per second

    @property
    def vocabulary(self) -> Mapping[str, int]: ...  # ids of the tokens of prompts; {} if there are no prompts

    def base(self) -> dict[str, str]:
        """Returns the identity (a hash) of the origin of each set of frozen weights, by name; {} if nothing is frozen.

        A run is not continued if its base has changed.
        """
        ...

    def train_source(self) -> Any:
        """Returns a grain.MapDataset or random-access source (len, []) of dicts of numpy arrays, one per example."""
        ...

    def eval_batches(self, batch_size: int) -> Iterable[Batch]:
        """Returns the held-out batches; they are the same at every call and on every process."""
        ...

    def sample_callback(self, mesh: Mesh) -> Callable[[Model], SampleImages]:
        """Returns the function that generates the sample images of an evaluation from a model that lies on the mesh.

        The loop calls this method before the first step; it opens everything that the function needs.
        """
        ...

    def export(self, model: Model, directory: Path, run: dict[str, Any]) -> None:
        """Writes the weights in the project's own layout into an empty directory; the model's arrays are on the host.

        ``run`` describes the origin of the weights, for a manifest: see ``origin``.
        """
        ...
