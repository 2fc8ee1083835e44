"""Gives numbers to host objects, so that compiled programs can call them without holding references.

A compiled program, and every object that is compiled into it, stays in memory until the process ends. So an object that
a program calls, such as an index or a progress bar, is passed as a number, which is an ordinary argument. The host
looks the object up when the program calls. One compiled program then serves all such objects and keeps none of them
alive.

Calls of compiled programs return before the programs end. So a program may still run when the last handle of an object
is deleted. The object is therefore kept until all results are ready that were pending at that time.
"""

import gc
import itertools
import threading
import weakref
from typing import Any

import jax
import numpy as np

_numbers = itertools.count()
_lock = threading.RLock()  # re-entrant, because garbage collection can delete a handle at any point
_targets: dict[int, Any] = {}
_handles: "weakref.WeakValueDictionary[int, Handle]" = weakref.WeakValueDictionary()
_leaving: list[tuple[int, list[Any]]] = []  # objects without a handle, and pending results that may need them


class Handle:
    """A reference to an object that programs find by ``number`` as long as the handle exists.

    Attributes:
      target: the object.
      number: number of the handle, unique in this process.
    """

    def __init__(self, target: Any):
        _sweep()
        self.target, self.number = target, next(_numbers)
        _targets[self.number] = target
        _handles[self.number] = self
        weakref.finalize(self, _release, self.number).atexit = False


def look_up(number: Any) -> Any:
    """Returns the object of a number, given as an array of equal numbers; None if the object is gone."""
    return _targets.get(int(np.asarray(number).reshape(-1)[0]))


def holder(number: Any) -> Handle | None:
    """Returns the handle of a number; None if it is gone, or the number is a tracer or not an array."""
    if isinstance(number, jax.core.Tracer) or not isinstance(number, np.ndarray | np.generic | jax.Array):
        return None
    if isinstance(number, jax.Array):  # an array may span several processes; reads the local part
        number = number.addressable_shards[0].data
    return _handles.get(int(np.asarray(number).reshape(-1)[0]))


def _release(number: int) -> None:
    """Schedules the removal of an object whose handle is gone, after all results that are pending now."""
    pending = [array for array in jax.live_arrays() if not array.is_deleted() and not array.is_ready()]
    with _lock:
        _leaving.append((number, pending))
    _sweep()


def _sweep(phase: str = "stop", _: Any = None) -> None:
    """Removes the objects that no pending result needs; also called after each garbage collection."""
    if phase == "stop" and _leaving:
        with _lock:
            for leaving in list(_leaving):
                if all(array.is_deleted() or array.is_ready() for array in leaving[1]):
                    _leaving.remove(leaving)
                    _targets.pop(leaving[0], None)


gc.callbacks.append(_sweep)
