"""Variable types: what is trained is said by a type, not by a name."""

from flax import nnx


class Frozen(nnx.Variable):
    """A parameter that this run does not train; it has no optimizer state."""


def freeze(module: nnx.Module) -> None:
    """Turns every ``nnx.Param`` of a module into ``Frozen``, in place."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if type(value) is nnx.Param:
                    setattr(node, name, Frozen(value[...]))
