"""Finds the place of a process in its run, and connects it to the others at the coordinator's address."""

import dataclasses
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from jax._src import clusters, distributed  # private, because the public function does not let us handle failures
from jax._src.lib import _jax

from arrag_jax import hub
from arrag_jax.errors import UserError, say

REMINDER = 10.0  # seconds between two lines that name the missing processes
GREETING = 3.0  # seconds within which a hub sends its greeting


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process in its run."""

    address: str  # address of the coordinator, host:port
    count: int  # number of processes
    index: int  # number of this process
    devices: Sequence[int] | None = None  # devices of this host that this process uses; None = all


def described(seconds: float = 60) -> Place | None:
    """Returns the place of this process from environment variables; None in a run of one process.

    Args:
      seconds: time limit for a cluster's services to answer.

    Raises:
      UserError: if the variables are incomplete or not valid.
    """
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            place = Place(env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"]))
            if env.get("JAX_LOCAL_DEVICE_IDS"):
                devices = [int(number) for number in env["JAX_LOCAL_DEVICE_IDS"].split(",")]
                place = dataclasses.replace(place, devices=devices)
        except KeyError as error:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is set, so {error.args[0]} must be set too") from error
        except ValueError as error:
            raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers ({error})") from error
    elif (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    ):
        detect: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params  # reads the cluster's variables
        place = Place(*detect(None, None, None, None, None, int(seconds)))
    else:
        return None
    host, _, port = place.address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={place.address!r} is not of the form host:port")
    if not 0 <= place.index < place.count:
        numbers = f"0 to {place.count - 1}" if place.count > 0 else "none"
        raise UserError(f"JAX_PROCESS_ID={place.index} is not among JAX_NUM_PROCESSES={place.count} numbers: {numbers}")
    return place if place.count > 1 else None


def is_one_of_several() -> bool:
    """Returns whether variables say that this process is one of several; those of a TPU pod do not say it."""
    names = "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"
    return any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1 for name in names)


class Channel:
    """A connection to the hub; messages are JSON objects, one per line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._buffer = connection, b""
        connection.settimeout(10)

    def send(self, kind: str, **content: Any) -> None:
        """Sends a message; raises OSError if the hub is gone."""
        self._socket.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """Returns the messages that have arrived; waits up to ``seconds`` for the first data.

        Raises:
          OSError: if the hub is gone, or the other side is not a hub.
        """
        if not select.select([self._socket], [], [], max(0.0, seconds))[0]:
            return []
        received = self._socket.recv(2**16)
        self._buffer += received
        *lines, self._buffer = self._buffer.split(b"\n")
        if not received or len(self._buffer) > 2 * hub.MAX_BYTES:
            raise ConnectionError("closed")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ConnectionError("no hub") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("no hub")
        return messages

    def close(self) -> None:
        self._socket.close()


class Waiting:
    """A wait for other processes with a time limit; prints the missing processes at intervals."""

    def __init__(self, place: Place, seconds: float):
        self.place, self.seconds = place, seconds
        self._since = self._said = time.monotonic()

    @property
    def left(self) -> float:
        return self._since + self.seconds - time.monotonic()

    def for_(self, missing: list[int], state: str) -> None:
        """Prints, at intervals, that these processes are missing.

        Args:
          missing: numbers of the processes.
          state: what is wrong with them, for the message.

        Raises:
          UserError: if the time limit is reached.
        """
        if not missing:
            missing = [0]  # all are connected, but process 0 has not confirmed it
        names = ("process " if len(missing) == 1 else "processes ") + ", ".join(map(str, missing))
        where = f"{names} of {self.place.count}"
        if self.left <= 0:
            raise UserError(
                f"{where} {state} {self.place.address} within {self.seconds:g} s; start all processes with one "
                "JAX_COORDINATOR_ADDRESS and each with its own JAX_PROCESS_ID, or wait longer with --wait=SECONDS"
            )
        now = time.monotonic()
        if now - self._said >= REMINDER:
            self._said = now
            say(f"waiting for {where} at {self.place.address} ({int(now - self._since)} of {self.seconds:g} s)")


def meet(place: Place, patience: float, wait: float, **hello: Any) -> tuple[Channel, list[dict[str, Any]]]:
    """Waits until all processes are connected and belong together.

    Returns:
      The channel to the hub, and the messages that arrived after its "go".

    Raises:
      UserError: if this takes more than ``wait`` seconds, or the processes do not belong together.
    """
    hindrance = start_hub(place, patience) if place.index == 0 else ""
    waiting = Waiting(place, wait)
    while True:
        channel, state = None, "did not come to"
        try:
            channel = knock(place.address, waiting.left)
            state = "did not answer (another program does, or the run has begun already) at"
            greeting = channel.receive(min(GREETING, waiting.left))
            if greeting and greeting[0].get("kind") == "hub":
                hindrance = ""
                channel.send("hello", index=place.index, count=place.count, host=socket.gethostname(), **hello)
                return channel, wait_for_go(channel, waiting)
        except OSError:
            pass
        if channel is not None:
            channel.close()
        if hindrance:
            raise UserError(f"process 0 cannot listen at {place.address}: {hindrance}; choose another port")
        waiting.for_([0], state)
        time.sleep(max(0.0, min(0.2, waiting.left)))


def knock(address: str, seconds: float) -> Channel:
    """Returns a connection to this address; raises OSError if nothing answers there."""
    host, _, port = address.rpartition(":")
    return Channel(socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, min(5.0, seconds))))


def wait_for_go(channel: Channel, waiting: Waiting) -> list[dict[str, Any]]:
    """Waits until the hub starts the run; returns the messages that it sent after "go".

    Raises:
      UserError: if the hub refuses the run, or the time limit is reached.
      OSError: if the hub is gone.
    """
    missing: list[int] = []
    while True:
        messages = channel.receive(min(1.0, waiting.left))
        for number, message in enumerate(messages):
            if message["kind"] == "go":
                return messages[number + 1 :]
            if message["kind"] == "refused":
                raise UserError(message["why"])
            missing = message.get("missing", missing)
        waiting.for_(missing, "did not come to")


def start_hub(place: Place, patience: float) -> str:
    """Starts the hub program of process 0; returns "", or the reason why it cannot listen."""
    port = place.address.rpartition(":")[2]
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
    # -P keeps the folder of hub.py off the module path. The hub's stderr is the file of ``native_output``.
    command = [sys.executable, "-P", hub.__file__, port, str(place.count), str(patience), bind, _jax.__name__]
    global _hub
    _hub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert _hub.stdout is not None
    word = _hub.stdout.readline().decode().strip()
    return "" if word == "listening" else word or "its helper program did not start"


_hub: subprocess.Popen | None = None  # kept open, because the hub sees from the pipe that this process is alive


def start_jax(place: Place, patience: float) -> None:
    """Connects jax to its coordination service, which the hub hosts.

    This replaces ``jax.distributed.initialize``, which would also start a service and handle SIGTERM.

    Raises:
      UserError: if jax cannot connect.
    """
    from jax._src import config

    if place.devices is not None:
        visible = ",".join(map(str, place.devices))
        config.config.update("jax_cuda_visible_devices", visible)
        config.config.update("jax_rocm_visible_devices", visible)
    state, seconds = distributed.global_state, hub.jax_patience(patience)
    state.coordinator_address, state.process_id, state.num_processes = place.address, place.index, place.count
    state.client = _jax.get_distributed_runtime_client(
        place.address, place.index, init_timeout=60, heartbeat_timeout=seconds, use_compression=True
    )
    try:
        state.client.connect()
    except Exception as error:
        state.client = None
        raise UserError(f"process {place.index} cannot join jax's service at {place.address} ({error})") from error
