"""A Ray cluster of several nodes on loopback, in processes of its own, for tests that kill some of them.

Run as a script, this file holds the cluster: it prints one line for each node, adds a node for each
line that it reads, and ends everything when its stdin closes. Drivers join it in fresh processes, as commands do:
``ray.init`` has hung in a process that had run hundreds of other tests.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil

from helpers import children

# A dead node is noticed within 5 s, not 15; a node that is only slow stays.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}


DRIVER = "import pkgutil, sys; f, *words = sys.argv[1:]; sys.argv[1:] = []; pkgutil.resolve_name(f)(*words)"
LEAVING = 10.0  # seconds for killed processes to be gone


class Node:
    """One node; ``raylet`` is the process whose death makes Ray think that the machine died."""

    def __init__(self, line: str):
        told = json.loads(line)
        self.address, self.raylet = told["address"], psutil.Process(told["raylet"])

    def workers(self) -> list[psutil.Process]:
        """Processes that work on an item or wait for one."""
        found = []
        for process in self.raylet.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += [process] if process.name().startswith("ray::Hand") else []
        return found


class Cluster:
    """Nodes of one core each, the first of which is the head."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.nodes = [Node(self._read())]

    @property
    def address(self) -> str:
        return self.nodes[0].address

    def add(self) -> Node:
        """Adds a node."""
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self.nodes.append(Node(self._read()))
        return self.nodes[-1]

    def _read(self) -> str:
        line = self._process.stdout.readline()
        assert line, "the cluster did not start"
        return line


@contextlib.contextmanager
def running(nodes: int) -> Iterator[Cluster]:
    """A cluster of so many nodes; none of its processes outlives this."""
    environment = children.alone() | ENVIRONMENT
    command = [sys.executable, "-m", "helpers.cluster"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        seen: list[psutil.Process] = []
        try:
            cluster = Cluster(process)
            for _ in range(nodes - 1):
                cluster.add()
            seen = [psutil.Process(process.pid)]
            yield cluster
        finally:
            # Agents of a killed raylet and stopped workers belong to nobody any more, so they are found by the session.
            with contextlib.suppress(psutil.Error):
                seen += psutil.Process(process.pid).children(recursive=True)
            for other in psutil.process_iter():
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    seen += [other] if os.getsid(other.pid) == process.pid else []
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for left in seen:
                with contextlib.suppress(psutil.Error):
                    left.kill()
            assert not psutil.wait_procs(seen, LEAVING)[1]


def driving(function: str, *words: str) -> subprocess.Popen:
    """Calls MODULE:FUNCTION with these words in a fresh process."""
    command = [sys.executable, "-c", DRIVER, function, *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=children.alone() | ENVIRONMENT, **pipes)


def drive(function: str, *words: str, seconds: float = 120) -> str:
    """The same; waits for its end, and returns what it printed."""
    with driving(function, *words) as process:
        try:
            printed = process.communicate(timeout=seconds)[0]
        finally:
            process.kill()
    assert process.returncode == 0, printed
    return printed


def wait_until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Waits for something to become true."""
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, "it did not happen"
        time.sleep(0.05)


def main() -> None:
    from ray.cluster_utils import Cluster as RayCluster

    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints on stdout, too
    place = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, **place})

    def tell(node) -> None:
        (info,) = node.all_processes["raylet"]
        print(json.dumps({"address": cluster.address, "raylet": info.process.pid}), file=said, flush=True)

    tell(cluster.head_node)
    for _ in sys.stdin:
        tell(cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cluster.shutdown()


if __name__ == "__main__":
    main()
