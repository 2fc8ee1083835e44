"""The compiled step of a training run: its memory before it first runs, and a profile of some of its runs."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from arrag_jax.errors import UserError
from arrag_jax.progress import tell

GIB = 2**30


class Step:
    """A jitted function that is compiled at its first call, for a mesh; then it says how much memory it takes."""

    def __init__(self, function: Any, mesh: Mesh):
        self._function, self._mesh = function, mesh
        self._program: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Returns the function's result; all calls must have arguments of the same shapes and shardings."""
        with jax.set_mesh(self._mesh):
            if self._program is None:
                self._program = self._function.lower(*arguments).compile()
                if jax.process_index() == 0:
                    tell(memory_line(self._program.memory_analysis(), jax.local_devices()[0]))
            return self._program(*arguments)


def memory_line(memory: Any, device: Any) -> str:
    """Returns a line that says what a compiled program needs of a device's memory.

    Args:
      memory: ``compiled.memory_analysis()``.
      device: its limit is named where JAX knows it.
    """
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    limit = (device.memory_stats() or {}).get("bytes_limit")
    of = f" of {limit / GIB:.2f}" if limit else ""
    return (
        f"a step needs {(held + temporary + new) / GIB:.2f}{of} GiB per device: {held / GIB:.2f} GiB of state and "
        f"batch, {temporary / GIB:.2f} GiB while it runs"
    )


class Profile(NamedTuple):
    """The steps to profile, from ``first`` up to and including ``last``; none if both are 0."""

    first: int = 0
    last: int = 0

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Returns the steps of ``--profile=START:STOP``; none for an empty text.

        Raises:
          UserError: if the text has another form.
        """
        if not text:
            return cls()
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--profile={text} must be START:STOP, two steps from 1 on, such as --profile=10:12")
        return cls(int(found[1]), int(found[2]))

    def before(self, step: int, folder: Path) -> None:
        """Starts to record if this step is the first one; the trace goes into ``folder``."""
        if step == self.first:
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)

    def after(self, step: int, result: Any) -> None:
        """Waits for the step's result and writes the trace if this step is the last one."""
        if self.first and step == self.last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                tell(f"the profile of steps {self.first} to {self.last} is in --workdir, folder profile")


NO_PROFILE = Profile()
