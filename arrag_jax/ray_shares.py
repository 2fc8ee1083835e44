"""Asks the same question of all shares of something that one machine cannot hold, such as the segments of a store.

A share has an actor of its own on a Ray cluster, a worker that stays open and answers. If an actor or its machine dies,
the share is opened again wherever the cluster has room, and the question waits: no answer is ever given from fewer
shares. The processes of one job use the same actors, so that workers which draw on the cluster open none of their own.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from arrag_jax import on_ray, progress
from arrag_jax.errors import UserError
from arrag_jax.ray_actor import Hand, versions
from arrag_jax.work import Worker

NAMESPACE = "arrag_jax"
OPENINGS = 10  # times that a share is opened, because actors and machines die meanwhile, before the search gives up
SPREAD = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}  # no cores, because drawing on the same machines takes them


class Shares:
    """The actors of all shares.

    Args:
      cluster: as in ``on_ray.join``.
      makers: name of each share → what opens its worker there; the name says everything that the worker depends on.
      label: what they are shares of, for messages.

    Raises:
      UserError: if the cluster cannot be joined, or a share cannot be opened.
    """

    def __init__(self, cluster: str, makers: Mapping[str, Callable[[], Worker]], label: str):
        self._ray, self._label = on_ray.join(cluster), label
        self._sent = {name: [self._ray.put(maker)] for name, maker in makers.items()}
        self._actors: dict[str, Any] = {}
        self.hosts: dict[str, str] = {}
        self._reason = ""  # why a share could not be opened
        self._open(list(makers))

    def ask(self, item: Any) -> list[Any]:
        """Returns the answers of all shares, in order; waits for shares that have to be opened again."""
        asked = {name: self._actors[name].do.remote(item) for name in self._sent}
        try:
            return [answer for answer, _ in self._ray.get(list(asked.values()))]
        except self._ray.exceptions.RayActorError:
            pass
        answers: dict[str, Any] = {}
        while lost := [name for name in self._sent if name not in answers]:
            gone = []
            for name in lost:
                try:
                    answers[name] = self._ray.get(asked[name])[0]
                except self._ray.exceptions.RayActorError:
                    gone.append(name)
            if gone:
                where = ", ".join(dict.fromkeys(self.hosts[name] for name in gone))
                lost_now = f"{len(gone)} of {len(self._sent)} shares of {self._label} are lost with {where}"
                progress.tell(f"{lost_now}; loading them elsewhere")
                self._open(gone)
                asked |= {name: self._actors[name].do.remote(item) for name in gone}
        return [answers[name] for name in self._sent]

    def _open(self, names: list[str]) -> None:
        """Opens shares at the same time; again, if one of their actors dies meanwhile."""
        for _ in range(OPENINGS):
            opening = {name: self._opening(name) for name in names}
            names = [name for name, reference in opening.items() if not self._is_open(name, reference)]
            if not names:
                return
        raise UserError(
            f"share {names[0]} cannot be opened: its process has died {OPENINGS} times; give it more memory"
        )

    def _opening(self, name: str) -> Any:
        """Starts an actor, or finds that of another process of this job; returns the reference to its answer."""
        job = self._ray.get_runtime_context().get_job_id()
        options = {**SPREAD, "name": f"{name} {job}", "namespace": NAMESPACE, "get_if_exists": True}
        try:
            actor = self._actors[name] = self._ray.remote(Hand).options(**options).remote()
            return actor.open.remote(versions(), "cpu", os.getcwd(), self._sent[name], name)
        except (self._ray.exceptions.RayError, ValueError) as error:  # the old one of this name is just dying
            self._reason = on_ray.reason(error)
            return None

    def _is_open(self, name: str, reference: Any) -> bool:
        if reference is None:
            time.sleep(on_ray.TICK)
            return False
        while not self._ray.wait([reference], timeout=on_ray.REMINDER)[0]:
            progress.tell(f"waiting until a machine of the cluster has opened share {name}")
        try:
            self.hosts[name], _, problem = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._reason = on_ray.reason(error)
            time.sleep(on_ray.TICK)
            return False
        if problem:
            raise UserError(f"{self.hosts[name]} cannot open share {name}: {problem}")
        return True
