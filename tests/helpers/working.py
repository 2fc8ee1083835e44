"""Engines of ``arrag_jax.work`` for tests."""

import threading

from arrag_jax.work import Processes


def in_threads(count: int) -> list[Processes]:
    """One engine a thread; they stand in for the processes of one run."""
    barrier, values = threading.Barrier(count, timeout=60), {}

    def agreed(index: int):
        def agree(value: str, what: str) -> str:
            values[index] = (value, what)
            barrier.wait()
            assert len({told for _, told in values.values()}) == 1, values  # all make the same calls
            first = values[0][0]
            barrier.wait()
            return first

        return agree

    return [Processes(index, count, agreed(index)) for index in range(count)]
