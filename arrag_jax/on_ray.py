"""Data-parallel work on a Ray cluster: the engine that ``work`` uses for --ray.

The driver, which is the process of the command, keeps the list of items and hands them out one at a time. An actor per
accelerator, or per some cores where the cluster has no accelerator, opens its worker once and works on them. The actors
write files straight to where they belong. Ray is imported only here, and only when a cluster is asked for.

An item whose worker fails, or whose process dies, is worked on again, ``TRIES`` times in all. If its machine dies, the
try does not count. Actors are started wherever the cluster has room while items are left, so that machines may join and
leave. What has been written remains when the command ends in any way.
"""

import contextlib
import dataclasses
import importlib
import os
import signal
import socket
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from arrag_jax import progress
from arrag_jax.errors import UserError, printable
from arrag_jax.ray_actor import Hand, versions

TRIES = 3  # times that an item is worked on before the command gives up
TICK = 1.0  # seconds between two looks at signals, and at the machines of the cluster
REMINDER = 30.0  # seconds between two lines that say that there is no machine
CONNECT = 10.0  # seconds for the cluster's port to answer
ACCELERATORS = {"GPU": "cuda,cpu", "TPU": "tpu,cpu"}  # Ray's name of a resource → JAX_PLATFORMS of its workers
# Ray reports its use to its makers, and warns of a change to come, unless these say otherwise.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# A cluster for one command has one machine: Ray must not take it for dead because it is overloaded.
LOCAL = {"RAY_health_check_timeout_ms": "60000", "RAY_health_check_failure_threshold": "100"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray replaces 127.0.0.1 by the machine's own address


@contextlib.contextmanager
def connected(address: str, cores: int) -> Iterator["OnRay"]:
    """Yields the engine of a cluster; on exit it is left, or stopped if it was started for this.

    Args:
      address: as in ``join``.
      cores: CPU cores per worker, where the cluster has no accelerator.

    Raises:
      UserError: as in ``join``.
    """
    ray = join(address)
    try:
        yield OnRay(ray, address, cores)
    finally:
        ray.shutdown()


def join(address: str) -> Any:
    """Returns the package ray, connected to a cluster until the process ends; a connection that exists is kept.

    Args:
      address: "local" starts a cluster on this machine alone; "auto" joins the one that runs on this machine;
        "HOST:PORT" joins the one whose head listens there.

    Raises:
      UserError: if Ray is not installed, the cluster cannot be reached, or it has another version of Ray or Python.
    """
    is_loopback = address == "local" or address.startswith(("localhost:", "127.0.0.1:"))
    os.environ.update(QUIET | (LOOPBACK if is_loopback else {}) | (LOCAL if address == "local" else {}))
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError(f"--ray={address} needs the package ray; install it: pip install 'arrag_jax[ray]'") from error
    if ray.is_initialized():
        return ray
    _require_answer(address)
    place = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if address == "local" else {}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            # JAX warns of forks. No backend has started yet, and Ray's children begin other programs at once.
            warnings.filterwarnings("ignore", category=RuntimeWarning, message=r"os\.fork\(\)")
            ray.init(address, log_to_driver=False, logging_level="ERROR", **place)
    except Exception as error:  # Ray raises many types, and Exception itself if a cluster does not start in time
        raise UserError(_unreachable(address, error)) from error
    finally:
        for number, handler in before.items():  # Ray replaces them
            signal.signal(number, handler)
    return ray


def machines(address: str) -> int:
    """Returns the number of machines of a cluster; joins it."""
    return sum(node["Alive"] for node in join(address).nodes())


def _require_answer(address: str) -> None:
    """Raises UserError unless a program listens at HOST:PORT; Ray itself waits for a minute."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise UserError(f"--ray={address} is not auto, local or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at --ray={address} ({error.strerror or error}); start one there: ray start --head"
        ) from error


def _unreachable(address: str, error: Exception) -> str:
    """Returns the message for a cluster that cannot be joined."""
    words = " ".join(str(error).split())
    if "ersion mismatch" in words:
        return f"the cluster at --ray={address} has another version of Ray or Python: {words}; use one on all machines"
    if address == "auto" and "Could not find any running Ray instance" in words:
        return "no Ray cluster runs on this machine (--ray=auto); start one: ray start --head, or give --ray=local"
    return (
        f"cannot join the Ray cluster --ray={address}: {printable(words)[:300]}; run the command on one of its "
        "machines (ray start --address=… makes this one of them)"
    )


@dataclasses.dataclass
class _Actor:
    """The driver's view of an actor."""

    handle: Any
    host: str = "?"
    node: str = ""  # Ray's id of its machine; known once it is open


class OnRay:
    """The engine of a Ray cluster; see the module."""

    leads = True

    def __init__(self, ray: Any, address: str, cores: int):
        self._ray, self._address, self._cores = ray, address, cores
        self._spare: list[_Actor] = []  # actors of earlier work

    def meet(self, what: str, value: str = "") -> str:
        return value

    def alone(self) -> "OnRay":
        return self

    def run(self, work: Any) -> Iterator[tuple[Any, Any]]:
        if not work.items:
            return
        total, left = sum(work.sizes.values()), sum(work.sizes[item] for item in work.items)
        sent = [self._ray.put(work.make_worker)]  # in a list, because Ray would open it as an argument
        with (
            progress.bar(total=total, initial=total - left, unit=work.unit, desc=work.label) as bar,
            contextlib.closing(_Pool(self._ray, self._room, sent, self._spare)) as pool,
        ):
            queue, tries = deque(work.items), Counter[Any]()
            while queue or pool.busy:
                pool.grow(len(queue) + len(pool.busy))
                while queue and pool.idle:
                    pool.give(queue.popleft())
                bar.set_postfix_str(f"{pool.open} workers", refresh=False)
                for item, answer in pool.answers():
                    if isinstance(answer, _Failure):
                        tries[item] += answer.counts
                        if tries[item] == TRIES:
                            raise UserError(
                                f"{work.noun} {_named(item)} of {work.label} failed {TRIES} times, {answer}"
                            )
                        queue.append(item)
                        continue
                    result, told = answer
                    for line in told:
                        progress.tell(line)
                    bar.update(work.sizes[item])
                    yield item, result

    def _room(self) -> tuple[int, dict[str, Any]]:
        """Returns how many workers the machines have room for, and what Ray must give each of them."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for name, platforms in ACCELERATORS.items():
            numbers = [int(machine[name]) for machine in machines if machine.get(name, 0) >= 1]
            if numbers and name == "GPU":
                return sum(numbers), {"num_gpus": 1, "num_cpus": 1, "platforms": platforms}
            if numbers:  # one process uses all chips of its host
                return len(numbers), {"resources": {name: min(numbers)}, "num_cpus": 1, "platforms": platforms}
        numbers = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
        if not numbers:
            return 0, {}
        cores = min(self._cores, *numbers)
        return sum(number // cores for number in numbers), {"num_cpus": cores, "platforms": "cpu"}


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why an item was not finished; ``counts`` says whether it counts as a try."""

    host: str
    reason: str
    counts: bool

    def __str__(self) -> str:
        return f"the last time on {self.host}: {self.reason}"


class _Pool:
    """The actors of one piece of work, and what each is doing.

    Args:
      room: returns how many actors the cluster has room for, and the options of each.
      sent: a list of one reference, to the function that makes a worker.
      spare: idle actors, which are taken first; ``close`` puts idle ones back.
    """

    def __init__(
        self, ray: Any, room: Callable[[], tuple[int, dict[str, Any]]], sent: Sequence[Any], spare: list[_Actor]
    ):
        self._ray, self._room, self._sent, self._spare = ray, room, sent, spare
        self._opening: dict[Any, _Actor] = {}  # reference to its answer → actor
        self.busy: dict[Any, tuple[_Actor, Any]] = {}  # reference to its answer → actor, item
        self.idle: list[_Actor] = []
        self._unfit = 0  # actors that could not open their worker
        self._target, self._looked, self._worked = 0, 0.0, time.monotonic()

    @property
    def open(self) -> int:
        """Number of actors that have opened their worker."""
        return len(self.idle) + len(self.busy)

    def grow(self, items: int) -> None:
        """Starts actors while the cluster has room and there are items for them."""
        if time.monotonic() - self._looked > TICK:
            self._looked = time.monotonic()
            self._target, options = self._room()
            platforms = options.pop("platforms", "")
            for _ in range(min(items, self._target - self._unfit) - self.open - len(self._opening)):
                hand = self._ray.remote(Hand).options(max_restarts=0, max_task_retries=0, **options)
                actor = self._spare.pop() if self._spare else _Actor(hand.remote())
                self._opening[actor.handle.open.remote(versions(), platforms, os.getcwd(), self._sent)] = actor

    def give(self, item: Any) -> None:
        """Hands an item to an idle actor."""
        actor = self.idle.pop()
        self.busy[actor.handle.do.remote(item)] = actor, item

    def answers(self) -> Iterator[tuple[Any, Any]]:
        """Yields (item, answer) of what ends within ``TICK`` seconds; answers are (result, lines) or a ``_Failure``."""
        waiting = [*self._opening, *self.busy]
        if not waiting:
            self._wait_for_machines()
            return
        self._worked = time.monotonic()
        for reference in self._ray.wait(waiting, num_returns=1, timeout=TICK)[0]:
            if reference in self._opening:
                self._welcome(self._opening.pop(reference), reference)
                continue
            actor, item = self.busy.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                died = self._machine_died(actor, error)
                yield item, _Failure(actor.host, "the machine died" if died else _death(error), not died)
            except self._ray.exceptions.RayError as error:
                self.idle.append(actor)
                yield item, _Failure(actor.host, reason(error), True)
            else:
                self.idle.append(actor)
                yield item, answer

    def close(self) -> None:
        """Ends the actors that are at work; what they are writing stays unfinished."""
        for actor in [*self._opening.values(), *(actor for actor, _ in self.busy.values())]:
            self._ray.kill(actor.handle)
        self._spare += self.idle

    def _welcome(self, actor: _Actor, reference: Any) -> None:
        """Takes the answer of an actor that was asked to open its worker."""
        try:
            actor.host, actor.node, problem = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            if actor.node or self._machine_died(actor, error):  # a spare one may have died meanwhile
                return
            problem = reason(error) if error.actor_init_failed else _death(error)
        except self._ray.exceptions.RayError as error:
            problem = reason(error)
        if not problem:
            self.idle.append(actor)
            return
        self._ray.kill(actor.handle)
        self._unfit += 1
        words = f"a worker on {actor.host} cannot begin: {problem}"
        if not (self.open or self._opening) and self._unfit >= min(self._target, TRIES):
            raise UserError(words)
        progress.tell(words)

    def _wait_for_machines(self) -> None:
        time.sleep(TICK)
        if time.monotonic() - self._worked > REMINDER:
            self._worked = time.monotonic()
            progress.tell("no machine of the cluster has room for a worker; waiting until one joins")

    def _machine_died(self, actor: _Actor, error: Any) -> bool:
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return error.preempted or "node has died" in str(error) or bool(actor.node and actor.node not in alive)


def _named(item: Any) -> str:
    return ", ".join(map(str, item)) if isinstance(item, tuple) else str(item)


def _death(error: Any) -> str:
    """Returns why an actor's process died."""
    out = "memory" in str(error).lower()
    return "its process died" + (": the machine ran out of memory" if out else " (it crashed, or it was killed)")


def reason(error: Any) -> str:
    """Returns one line about an exception in a worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    lines = (str(cause or error).strip() or "no message").splitlines()
    words = printable(lines[0 if cause else -1])  # without a cause it is a traceback
    if "No module named 'arrag_jax'" in words:
        return "the machine lacks the package arrag_jax; install it there in the same version"
    return f"{type(cause).__name__}: {words}" if cause is not None else words
