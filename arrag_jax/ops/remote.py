"""Objects of the host that compiled programs call: a number on the device, a handle on the host."""

import dataclasses
from typing import Any

import jax
import numpy as np

from arrag_jax.ops import handles
from arrag_jax.ops.host import Kinds, host_call


@jax.tree_util.register_pytree_node_class
class Remote:
    """A host object as a pytree. One compiled program serves all objects, and keeps none of them alive.

    Attributes:
      number: the number of the object's handle, int32.
      handle: keeps the object alive; None inside a program.
    """

    def __init__(self, target: Any):
        self.handle: handles.Handle | None = handles.Handle(target)
        self.number: Any = np.int32(self.handle.number)

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        """Returns the number and no static part, for JAX."""
        return (self.number,), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "Remote":
        """Inverts ``tree_flatten``."""
        made = object.__new__(cls)
        made.number, made.handle = leaves[0], handles.holder(leaves[0])
        return made

    def call(self, method: str, kinds: Kinds, *arguments: Any) -> tuple[jax.Array, ...]:
        """Returns what a method of the object returns for these arrays; see ``ops.host.host_call``.

        Args:
          method: name of a pure method that takes numpy arrays and returns a tuple of them.
        """
        return host_call(_Call(method), kinds, *arguments, self.number)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The callback of every program that calls a method of this name; equal callbacks share one compiled program."""

    method: str

    def __call__(self, *arguments: Any) -> tuple[np.ndarray, ...]:
        *arrays, number = map(np.asarray, arguments)
        target = handles.look_up(number)
        if target is None:
            raise RuntimeError(f"a program calls {self.method} of an object that was freed; keep it until it has ended")
        return getattr(target, self.method)(*arrays)
