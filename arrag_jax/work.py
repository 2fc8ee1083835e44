"""Does data-parallel work: one function over many independent items, such as the shards of a store.

``run_work`` is the only loop over such items. Its engine says where they are worked on: in this process, in all
processes of a run under ``jax.distributed``, each with a fixed share (``Processes``), or on a Ray cluster
(``on_ray.OnRay``).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax

from arrag_jax import on_ray, processes, progress, signals
from arrag_jax.errors import UserError
from arrag_jax.meeting import is_one_of_several

ITEM_SECONDS = 60.0  # time limit to finish the current item after a signal; batch systems wait twice as long
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
Value = TypeVar("Value")


@runtime_checkable
class Report(Protocol):
    """What a worker calls while it works on an item."""

    def count(self, units: int) -> None:
        """Advances the progress bar."""

    def tell(self, line: str) -> None:
        """Prints a line above the progress bar."""


Worker = Callable[[Any, Report], Any]  # (item, report) → result


class Opened(Generic[Value]):
    """Something that is open in this process, such as a model; a process to which it is sent opens it there.

    Args:
      again: opens it; must be picklable where it is sent. None = it cannot be sent.
      value: it, if it is open here already.
    """

    def __init__(self, again: Callable[[], Value] | None, value: Value | None = None):
        self._again, self._value = again, value

    def __call__(self) -> Value:
        """Returns it; opens it at the first call."""
        if self._value is None:
            assert self._again is not None
            self._value = self._again()
        return self._value

    def __reduce__(self) -> Any:
        if self._again is None:
            raise TypeError(f"{type(self._value).__name__} cannot be opened in another process")
        return Opened, (self._again,)


@dataclasses.dataclass(frozen=True)
class Work:
    """The arguments of ``run_work``, for an engine."""

    items: Sequence[Any]
    make_worker: Callable[[], Worker]
    sizes: Mapping[Any, int]
    label: str
    unit: str
    noun: str
    kept: bool


@runtime_checkable
class Engine(Protocol):
    """Where work is done."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what belongs to no item; exactly one process of a run does."""

    def meet(self, what: str, value: str = "") -> str:
        """Waits until every process of the run has called this, and returns the value of the one that leads."""

    def run(self, work: Work) -> Iterator[tuple[Any, Any]]:
        """See ``run_work``."""

    def alone(self) -> "Engine":
        """Returns the engine of work that only the process that leads begins."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process as number ``index`` of ``count`` that run the same command; by default it is alone.

    Each process works on every ``count``-th item. ``run`` ends when all processes have finished their shares.

    Attributes:
      agree: waits for all processes and returns the value of the first: (value, name of the call) → value.
    """

    index: int = 0
    count: int = 1
    agree: Callable[[str, str], str] = lambda value, what: value

    @property
    def leads(self) -> bool:
        return self.index == 0

    def meet(self, what: str, value: str = "") -> str:
        return self.agree(value, what)

    def run(self, work: Work) -> Iterator[tuple[Any, Any]]:
        own = list(work.sizes)[self.index :: self.count]  # a share of all items: which ones are left may change
        left = [item for item in own if item in set(work.items)]
        label = work.label + (f" (process {self.index} of {self.count})" if self.count > 1 else "")
        total = sum(work.sizes[item] for item in own)
        done = total - sum(work.sizes[item] for item in left)
        with (
            progress.bar(total=total, initial=done, unit=work.unit, desc=label) as bar,
            signals.held(work.noun, ITEM_SECONDS) if work.kept else contextlib.nullcontext() as point,
        ):
            worker = work.make_worker() if left else None
            for item in left:
                assert worker is not None
                yield item, worker(item, _Console(bar))
                if point is not None:
                    point.check()
        self.meet(f"end of {work.label}")

    def alone(self) -> Engine:
        return HERE


class _Console:
    """A ``Report`` to this process's own console."""

    def __init__(self, bar: progress.Bar):
        self._bar = bar

    def count(self, units: int) -> None:
        self._bar.update(units)

    def tell(self, line: str) -> None:
        progress.tell(line)


HERE = Processes()


def processes_of_run() -> Processes:
    """Returns the processes of this run; usually this process is alone."""
    place = processes.place()
    return HERE if place is None else Processes(place.index, place.count, processes.from_first)


@contextlib.contextmanager
def open_engine(ray: str = "", cores: int = 4) -> Iterator[Engine]:
    """Yields the engine of a command.

    Args:
      ray: "" for the processes of this run, which is usually this process alone; otherwise as in ``on_ray.connected``.
      cores: CPU cores per worker on Ray, where the cluster has no accelerator.

    Raises:
      UserError: if the cluster cannot be used, or both Ray and several processes are asked for.
    """
    if not ray:
        yield processes_of_run()
        return
    if processes.place() is not None or is_one_of_several():
        raise UserError(f"--ray={ray} starts workers itself; start the command once, not in several processes")
    if cores < 1:
        raise UserError(f"--ray_cores={cores} must be at least 1")
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the workers
    with on_ray.connected(ray, cores) as engine:
        yield engine


def run_work(
    items: Sequence[Item],
    make_worker: Callable[[], Callable[[Item, Report], Result]],
    sizes: Mapping[Item, int],
    label: str,
    unit: str = "image",
    noun: str = "shard",
    kept: bool = True,
    engine: Engine = HERE,
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, result) of each item, as it is finished; one progress bar shows them all.

    An item must not depend on another one, and working on it twice must write the same bytes.

    Args:
      items: the items to work on.
      make_worker: returns the function that works on an item. Called at most once in each process that works.
      sizes: the number of units of each item, including those that are finished already.
      label: the text of the progress bar; also the name of this call, which differs from that of other calls.
      unit: what the bar counts.
      noun: what an item is, in messages.
      kept: what finished items wrote stays if the command is interrupted; so a signal takes effect between two items.
      engine: where the items are worked on. Several processes must all call this; each yields its own items.

    Raises:
      UserError: if another process of the run has ended, or as the worker.
    """
    return engine.run(Work(items, make_worker, sizes, label, unit, noun, kept))
