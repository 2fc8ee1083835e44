"""``arrag studio`` over a small store, in a process of its own."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from helpers import children, drawings

ENOUGH = 240  # seconds for the start


class Studio(NamedTuple):
    """A studio that answers."""

    address: str
    pid: int


@contextlib.contextmanager
def started(tmp_path_factory) -> Iterator[Studio]:
    """A studio, which must answer until the end, stop in order, and never print a traceback."""
    folder = tmp_path_factory.mktemp("studio")
    store = drawings.make_store(tmp_path_factory)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "arrag_jax.studio", f"--store={store}", f"--port={port}", "--method=plain,caption"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=children.alone(), stdout=log, stderr=log)
        end = time.monotonic() + ENOUGH
        while "the studio is at" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield Studio(f"http://127.0.0.1:{port}", process.pid)
        assert process.poll() is None, (folder / "log").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    log = (folder / "log").read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :]
