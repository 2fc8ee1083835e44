"""Builds modules without numbers: their shapes alone, into which a checkpoint's tensors are read."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def abstract(build: Callable[..., Module], **of: Hashable) -> Module:
    """Returns the module ``build(**of, rngs=…)`` with shapes in place of its arrays, as ``nnx.eval_shape`` does.

    A build is traced once in a process; later calls with equal arguments return a new module of the same shapes. So
    ``build`` must be the same function each time, and depend on its arguments alone.
    """
    return nnx.merge(*_traced(build, **of), copy=True)


@functools.lru_cache(maxsize=64)
def _traced(build: Callable[..., nnx.Module], **of: Hashable) -> tuple[nnx.GraphDef, Any]:
    """Returns the module's graph and its abstract variables."""

    def traced() -> nnx.Module:
        return build(**of, rngs=_OneKey(0))

    return nnx.split(nnx.eval_shape(traced))


class _OneKey(nnx.Rngs):
    """Random streams that always give the same key, because abstract parameters need no other.

    A counted stream compares the shardings of its counter's old and new values at each key. While the counter is being
    traced, that searches everything traced so far, so a module's time would grow with the square of its size.
    """

    def __getattr__(self, name: str):
        stream = super().__getattr__(name)
        return lambda: stream.key[...]
