"""Variable types: what is trained is said by a type, not by a name."""

from typing import Any

from flax import nnx


class Frozen(nnx.Variable):
    """A parameter that this run does not train; it has no optimizer state and is not saved."""


class Adapter(nnx.Param):
    """A parameter that fine-tuning trains."""


def retype(module: Any, kind: type[nnx.Variable]) -> None:
    """Turns every ``nnx.Param`` of a module, and of the modules in it, into a variable of another type, in place."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if type(value) is nnx.Param:
                    setattr(node, name, kind(value[...]))


def freeze(module: Any) -> None:
    """Keeps every ``nnx.Param`` of a module as it is from now on."""
    retype(module, Frozen)
