"""Defines the variable types that say which parameters are trained."""

from typing import Any

from flax import nnx


class Frozen(nnx.Variable):
    """A parameter that this run does not train; it has no optimizer state and is not saved."""


class Statistic(nnx.Variable):
    """A number that a training task keeps beside the parameters; checkpoints hold it, exports do not."""


class Adapter(nnx.Param):
    """A parameter that fine-tuning trains."""


def retype(module: Any, kind: type[nnx.Variable]) -> None:
    """Changes the type of every ``nnx.Param`` in a module and its submodules to ``kind``, in place."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if type(value) is nnx.Param:
                    setattr(node, name, kind(value[...]))


def freeze(module: Any) -> None:
    """Makes every ``nnx.Param`` of a module ``Frozen``, in place."""
    retype(module, Frozen)
