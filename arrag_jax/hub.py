"""The hub of a run of several processes: a helper program that process 0 starts.

The hub listens at the coordinator's address until every process has connected, and checks that the processes belong
together. Then it hosts jax's coordination service at the same address. The connections stay open. A process that ends
sends a message first; if a connection closes without one, its process has died. The hub is a separate program, so it
can inform the others even if process 0 is killed.

Messages are JSON objects, one per line, with a "kind". The program runs as ``python -P hub.py`` and imports nothing of
this package.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_BYTES = 2**20  # maximum size of one message
PING = 1.0  # seconds between two heartbeats to each process
SETTLE = 10.0  # seconds before a refusal is sent, so that late processes receive it, too
LINGER = 120.0  # seconds after the end of the run until the hub exits, even if processes are still connected
DIFFERENCES = 3  # differing settings that a refusal lists


class Peer:
    """The connection to one process; ``index`` is None until the process has sent its "hello"."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer = connection, b""
        self.index: int | None = None
        self.hello: dict[str, Any] = {}
        self.state = "joining"  # later "working", "done" or "ended"
        self.heard = time.monotonic()

    @property
    def number(self) -> int:
        """The index of a process that has introduced itself."""
        assert self.index is not None
        return self.index

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message; errors are ignored, because reading the connection shows that the process is gone."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that have arrived; None if the connection is closed or its data is not valid."""
        try:
            received = self.connection.recv(2**16)
        except TimeoutError:
            return []
        except OSError:
            return None
        self.buffer += received
        if not received or len(self.buffer) > MAX_BYTES:
            return None
        *lines, self.buffer = self.buffer.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(message, dict) for message in messages):
            return None
        self.heard = time.monotonic()
        return messages


class Hub:
    """The state of the run: which processes are connected, and how each has ended.

    Args:
      listener: a listening socket at the coordinator's port.
      count: number of processes.
      patience: heartbeat timeout in seconds, after which a silent process counts as dead.
      serve: starts jax's service after the listener is closed.
    """

    def __init__(self, listener: socket.socket, count: int, patience: float, serve: Callable[[], None]):
        self.listener: socket.socket | None = listener
        self.count, self.patience, self.serve = count, patience, serve
        self.peers: list[Peer] = []
        self.failures: dict[int, dict[str, Any]] = {}
        self.values: dict[str, dict[int, Any]] = {}
        self.stop: dict[str, Any] | None = None
        self.steps: dict[int, int] | None = None
        self.over_since: float | None = None
        self.fault_since: float | None = None
        self.pinged = 0.0

    def run(self) -> None:
        """Serves the processes; returns when the run is over or no process is connected."""
        while self.listener or (self.peers and not self._lingers()):
            sockets = [peer.connection for peer in self.peers] + ([self.listener] if self.listener else [])
            lifeline = [sys.stdin] if self.listener else []  # shows whether process 0 lives before it has connected
            readable = select.select([*sockets, *lifeline], [], [], PING / 4)[0]
            if sys.stdin in readable and not os.read(sys.stdin.fileno(), 1):
                return
            if self.listener and self.listener in readable:
                self._accept(self.listener)
            for peer in [peer for peer in self.peers if peer.connection in readable]:
                self._hear(peer)
            if self.listener:
                self._judge()
            self._tick()

    def _lingers(self) -> bool:
        return self.over_since is not None and time.monotonic() - self.over_since > LINGER

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(5)
        keep_alive(connection, self.patience)
        self.peers.append(Peer(connection))
        self.peers[-1].send("hub")

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        for message in messages or ():
            self._take(peer, message)
        if messages is None:
            self.peers.remove(peer)
            peer.connection.close()
            if peer.state == "working":
                self._failed(peer.number, f"process {peer.index} of {self.count} died")
            self._settle()

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if peer.state == "joining":
            if kind == "hello" and isinstance(message.get("index"), int) and isinstance(message.get("settings"), dict):
                peer.index, peer.hello = message["index"], message
        elif kind == "ended":
            peer.state = "ended"
            peer.send("noted")
            self._failed(peer.number, message["line"], message["code"], message.get("stopped", False))
        elif kind == "done":
            peer.state = "done"
            self._settle()
        elif kind == "same":
            values = self.values.setdefault(message["name"], {})
            values[peer.number] = message["value"]
            if len(values) == self.count:
                del self.values[message["name"]]
                self._tell_all("values", name=message["name"], values=[values[i] for i in range(self.count)])
        elif kind == "stop" and self.stop is None:
            self.stop, self.steps = {"number": message["number"], "index": peer.index}, {}
            self._tell_all("stop", **self.stop)
        elif kind == "step" and self.steps is not None:
            self.steps[peer.number] = message["step"]
            if {other.index for other in self.peers if other.state == "working"} <= self.steps.keys():
                self._tell_all("stop_at", step=max(self.steps.values()) + 1)

    def _tell_all(self, kind: str, **content: Any) -> None:
        for peer in self.peers:
            if peer.state in ("working", "done"):
                peer.send(kind, **content)

    # Before the run

    def _judge(self) -> None:
        """Starts or refuses the run when all processes have connected."""
        came = [peer for peer in self.peers if peer.index is not None]
        fault = disagreement({id(peer): peer.hello for peer in came}, self.count)
        if fault and self.fault_since is None:
            self.fault_since = time.monotonic()
        settled = self.fault_since is not None and time.monotonic() - self.fault_since > SETTLE
        told = [peer.hello.get("count") for peer in came]
        if fault and (len(came) >= max([self.count, *(n for n in told if isinstance(n, int))]) or settled):
            self._close_listener()
            self._refuse(fault)
        elif not fault and len(came) == self.count:
            self._close_listener()
            for peer in [peer for peer in self.peers if peer.index is None]:
                self.peers.remove(peer)
                peer.connection.close()
            try:
                self.serve()
            except Exception as error:
                self._refuse(f"jax's service cannot start at the coordinator's address: {error}")
                return
            for peer in self.peers:
                peer.state = "working"
                peer.send("go")

    def _refuse(self, why: str) -> None:
        for peer in self.peers:
            peer.send("refused", why=why)
        self.over_since = time.monotonic()

    def _close_listener(self) -> None:
        if self.listener:
            self.listener.close()
        self.listener = None

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.pinged < PING:
            return
        self.pinged = now
        missing = sorted(set(range(self.count)) - {peer.index for peer in self.peers})
        for peer in self.peers:
            if peer.index is not None:
                peer.send("ping", missing=missing if self.listener else [])
            silent = now - peer.heard > self.patience
            if silent and peer.state == "working" and peer.hello.get("together") and peer.index not in self.failures:
                words = f"process {peer.index} of {self.count} gave no sign of life for {self.patience:.0f} s"
                self._failed(peer.number, words)

    # During and after the run

    def _failed(self, index: int, line: str, code: int | None = None, stopped: bool = False) -> None:
        """Records that a process ended before its work was done, and informs the others.

        Args:
          code: exit code of the process; None if it died.
          stopped: a signal stopped the process.
        """
        self.failures[index] = {"index": index, "line": line, "code": code, "stopped": stopped}
        if not any(peer.index == 0 and peer.state == "done" for peer in self.peers):  # else nothing is lost
            self._tell_all("failed", **self.failures[index])
        self._settle()

    def _settle(self) -> None:
        """Releases the processes that wait for the end of the run when no process is working any more."""
        working = [peer for peer in self.peers if peer.state == "working" and peer.index not in self.failures]
        waiting = [peer for peer in self.peers if peer.state in ("done", "ended")]
        if self.listener is None and not working and waiting:
            self.over_since = time.monotonic()
            clean = len([peer for peer in waiting if peer.state == "done"]) == self.count
            for peer in waiting:
                peer.send("over", clean=clean)


def disagreement(hellos: dict[Any, dict[str, Any]], count: int) -> str:
    """Returns the reason why these processes do not belong together; "" if there is none."""
    seen: dict[int, dict[str, Any]] = {}
    for hello in hellos.values():
        index = hello["index"]
        if hello.get("count") != count:
            words = f"process {index} was started for {hello.get('count')} processes, process 0 for {count}"
            return f"{words}; give all one number (JAX_NUM_PROCESSES)"
        if index in seen:
            hosts = " and ".join(sorted({str(seen[index].get("host")), str(hello.get("host"))}))
            return f"two processes (on {hosts}) have the number {index} of {count}; give each its own (JAX_PROCESS_ID)"
        seen[index] = hello
    for index in sorted(seen.keys() - {0}) if 0 in seen else ():
        told = differences(seen[0]["settings"], seen[index]["settings"], index)
        if told:
            return f"process {index} of {count} has other settings than process 0: {told}; give all the same command"
    return ""


def differences(first: dict[str, Any], other: dict[str, Any], index: int) -> str:
    """Returns the first keys whose values differ, as "key (1 in process 0, 2 in process 3), …"; "" if none does."""
    absent = object()
    keys = [key for key in sorted(first.keys() | other.keys()) if first.get(key, absent) != other.get(key, absent)]

    def told(values: dict[str, Any], key: str) -> str:
        text = repr(values[key]) if key in values else "absent"
        return text if len(text) <= 80 else f"{text[:60]}…{text[-19:]}"

    words = [f"{key} ({told(first, key)} in process 0, {told(other, key)} in process {index})" for key in keys]
    return ", ".join(words if len(keys) <= DIFFERENCES else [*words[:DIFFERENCES], "…"])


def keep_alive(connection: socket.socket, patience: float) -> None:
    """Makes the system detect within ``patience`` seconds that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", patience / 4), ("TCP_KEEPINTVL", patience / 4), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, int(value)))


def jax_patience(patience: float) -> int:
    """Returns jax's own heartbeat timeout in seconds; it is longer than ours, because jax ends without a clear line."""
    return max(60, int(3 * patience))


def listen(port: int) -> socket.socket:
    """Returns a socket that listens at this port on all interfaces."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def main() -> None:
    """Runs the hub.

    Command line arguments: port, number of processes, heartbeat timeout in seconds, address that jax's service binds
    to, and the module that holds this service. The module contains only jax's C++ code, because importing jax itself
    takes five times as long.
    """
    port, count, patience, bind = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes handle signals and report how they end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        listener = listen(port)
    except OSError as error:
        print(os.strerror(error.errno) if error.errno else error, flush=True)
        return
    print("listening", flush=True)
    service = []

    def serve() -> None:
        seconds = jax_patience(patience)
        module = importlib.import_module(sys.argv[5])
        service.append(module.get_distributed_runtime_service(bind, count, seconds, shutdown_timeout=seconds))

    Hub(listener, count, patience, serve).run()
    os._exit(0)


if __name__ == "__main__":
    main()
