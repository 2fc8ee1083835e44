"""Objects of the host that compiled programs call, found by number.

A compiled program lives as long as the process, and what is compiled into it lives as long. So an object that a program
calls (an index, a progress bar) is no part of it: it goes by a number, which is an argument like any other, and is
looked up when the program calls. One program then serves all objects alike, and none is kept for its sake.

A program may still run when the last holder of an object is gone, because calls of compiled programs return before they
end. So an object whose holders are gone stays until all results that were pending then are there.
"""

import gc
import itertools
import threading
import weakref
from typing import Any

import jax
import numpy as np

_numbers = itertools.count()
_lock = threading.RLock()  # a holder may go while another is made: collecting garbage can happen anywhere
_targets: dict[int, Any] = {}
_handles: "weakref.WeakValueDictionary[int, Handle]" = weakref.WeakValueDictionary()
_leaving: list[tuple[int, list[Any]]] = []  # objects without holders, and results that may still need them


class Handle:
    """Holds an object, which programs find by ``number`` for as long as the handle is held.

    Attributes:
      target: the object.
      number: its own in this process.
    """

    def __init__(self, target: Any):
        _sweep()
        self.target, self.number = target, next(_numbers)
        _targets[self.number] = target
        _handles[self.number] = self
        weakref.finalize(self, _release, self.number).atexit = False


def look_up(number: Any) -> Any:
    """The object of a number, given as an array of one number or of several equal ones; None where it is gone."""
    return _targets.get(int(np.asarray(number).reshape(-1)[0]))


def holder(number: Any) -> Handle | None:
    """The handle of a number that is no tracer; None where it is gone, or the number is not one that can be read."""
    if isinstance(number, jax.core.Tracer) or not isinstance(number, np.ndarray | np.generic | jax.Array):
        return None
    if isinstance(number, jax.Array):  # of an array that is spread over processes, this one's part
        number = number.addressable_shards[0].data
    return _handles.get(int(np.asarray(number).reshape(-1)[0]))


def _release(number: int) -> None:
    """Lets an object go whose last holder is gone, once no result is pending that may need it."""
    pending = [array for array in jax.live_arrays() if not array.is_deleted() and not array.is_ready()]
    with _lock:
        _leaving.append((number, pending))
    _sweep()


def _sweep(phase: str = "stop", _: Any = None) -> None:
    """Forgets the objects that nothing needs any more; called after each collection of garbage, too."""
    if phase == "stop" and _leaving:
        with _lock:
            for leaving in list(_leaving):
                if all(array.is_deleted() or array.is_ready() for array in leaving[1]):
                    _leaving.remove(leaving)
                    _targets.pop(leaving[0], None)


gc.callbacks.append(_sweep)
