"""Writes TensorBoard files with tensorboardX, without the PyTorch that it imports wherever it finds one."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Makes imports of a module in the block fail, as if it were not installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    hidden: Any = None  # ``import`` takes None for a module that cannot be imported
    sys.modules[name] = hidden
    try:
        yield
    finally:
        del sys.modules[name]


with _absent("torch"):  # its import takes seconds and hundreds of MiB, and serves graphs that are not written here
    from tensorboardX import summary as summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class TensorBoardFile(EventsWriter):
    """Writes TensorBoard events in the calling thread.

    tensorboardX's ``SummaryWriter`` writes in a thread of its own. A full disk ends that thread, and the run then waits
    for ever.
    """

    def __init__(self, folder: Path, step: int):
        """Creates a new file in ``folder``; TensorBoard then ignores events after ``step`` in older files."""
        super().__init__(str(folder / "events"))
        self.add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        """Writes one event: ``summary=…`` or ``session_log=…``."""
        self.write_event(Event(wall_time=time.time(), step=step, **content))
