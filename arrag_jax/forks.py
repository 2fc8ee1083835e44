"""Refuses work in a forked child process, where JAX would wait forever for threads that exist only in the parent."""

import os
import sys

from arrag_jax.errors import UserError

_forked = False


def _note() -> None:
    global _forked
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", lambda: bridge is not None)
    _forked = _forked or started()


os.register_at_fork(after_in_child=_note)


def require_own_process() -> None:
    """Raises UserError in a process that was forked after its parent had started JAX."""
    if _forked:
        raise UserError(
            "this process was forked after its parent had used JAX, whose threads do not come along; start it by "
            'multiprocessing.get_context("spawn"), or fork before anything is loaded'
        )
