"""Calls numpy code on the host from a compiled program, at the lowest cost that XLA allows.

``jax.pure_callback`` copies the arguments to a device before the call. For this it waits for the threads that run the
calling program, which is nine tenths of its cost in a decode loop (docs/LOG.md, 2026-11-24). For a program on one
device, ``host_call`` avoids the copy and passes numpy arrays. For a program on several devices it uses
``pure_callback``, which places the calls on them correctly.
"""

import atexit
import contextlib
import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Kinds = tuple[jax.ShapeDtypeStruct, ...]

_host_call = Primitive("host_call")
_host_call.multiple_results = True
_unfinished: list[Any] = []  # results of running programs that call the host
_closing = False


def awaited(result: jax.Array) -> None:
    """Makes the interpreter wait at exit for a result that a program with host calls computes.

    Without this, the program may call an interpreter that has shut down, which causes a segmentation fault.
    """
    _unfinished[:] = [*(x for x in _unfinished if not (x.is_deleted() or x.is_ready())), result]


@atexit.register
def _drain() -> None:
    global _closing
    _closing = True  # from now on host calls return zeros, because nobody reads the results
    left = [x for x in _unfinished if not (x.is_deleted() or x.is_ready())]
    if left:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        with contextlib.suppress(Exception):
            jax.block_until_ready(left)


@functools.partial(jax.jit, static_argnames=("function", "kinds"), inline=True)
def host_call(function: Callable[..., tuple[np.ndarray, ...]], kinds: Kinds, *arguments: Any) -> tuple[jax.Array, ...]:
    """Returns the result of ``function``, called on the host with arrays; supports no derivatives.

    Args:
      function: a pure, hashable function. It must use numpy only, because JAX inside a host callback hangs on CPU. Its
        arguments are views that are valid until it returns. Under ``vmap`` each argument has one more leading axis, of
        size 1 if it is not mapped.
      kinds: shape and dtype of each result, without the axes that ``vmap`` adds.
    """
    return tuple(_host_call.bind(*arguments, function=function, kinds=kinds))


@_host_call.def_abstract_eval
def _abstract(*arguments: Any, function: Callable, kinds: Kinds) -> list[Any]:
    return [jax.core.ShapedArray(kind.shape, kind.dtype) for kind in kinds]


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, function: Callable, kinds: Kinds) -> Any:
    if getattr(ctx.module_context.axis_context, "num_devices", None) == 1:
        call: Callable = functools.partial(mlir.emit_python_callback, has_side_effect=False, returns_token=False)

        def ask(*arguments: Any) -> tuple[np.ndarray, ...]:
            if _closing:
                return tuple(np.zeros(kind.shape, kind.dtype) for kind in ctx.avals_out)
            return function(*arguments)

        return call(ctx, ask, None, list(operands), ctx.avals_in, ctx.avals_out)[0]
    return mlir.lower_fun(lambda *arguments: jax.pure_callback(function, kinds, *arguments))(ctx, *operands)


def _batch(arguments: Any, axes: Any, *, function: Callable, kinds: Kinds) -> tuple[list[jax.Array], list[int]]:
    """Applies ``vmap`` as ``pure_callback`` does with vmap_method="expand_dims"."""
    pairs = list(zip(arguments, axes, strict=True))
    (size,) = {x.shape[axis] for x, axis in pairs if axis is not None}
    arguments = [x[None] if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]
    kinds = tuple(jax.ShapeDtypeStruct((size, *kind.shape), kind.dtype) for kind in kinds)
    return _host_call.bind(*arguments, function=function, kinds=kinds), [0] * len(kinds)


mlir.register_lowering(_host_call, _lower, cacheable=False)
batching.primitive_batchers[_host_call] = _batch
