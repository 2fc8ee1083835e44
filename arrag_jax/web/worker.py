"""One thread that draws: requests that wait and fit together are drawn as one batch."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from arrag_jax.decode.loop import SampleOutput
from arrag_jax.decode.stream import joined, partial_images
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.web.requests import ImagesRequest, mixing, placed, seeds_of

Images = UInt8[np.ndarray, "n h w 3"]


class Full(Exception):
    """Too many images wait."""


class Gone(Exception):
    """The client of a request went away."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request that waits or is drawn.

    Attributes:
      on_partial: called by the drawing thread with the number of a partial picture and the images so far.
      on_end: called by it with the images and their output, or with the error, once.
      dropped: set when the client is gone; then neither is called any more.
    """

    asked: ImagesRequest
    on_partial: Callable[[int, Images], Any]
    on_end: Callable[[tuple[Images, SampleOutput] | Exception], Any]
    dropped: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def fits(self) -> tuple[Any, ...]:
        """Jobs of which this is equal are drawn together."""
        return (self.asked.arrag.method, self.asked.arrag.weight, self.asked.arrag.temperature)


@dataclasses.dataclass
class Counts:
    """What the drawing thread has done since it began."""

    batches: int = 0
    images: int = 0
    failures: int = 0
    abandoned: int = 0  # batches that stopped half-way, because every client was gone
    seconds: float = 0.0


class Worker:
    """Draws jobs in a thread of its own, in the order in which they came.

    Attributes:
      counts: see ``Counts``.
    """

    def __init__(self, pipeline: Pipeline, most_waiting: int):
        self.pipeline, self.most_waiting, self.counts = pipeline, most_waiting, Counts()
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def waiting(self) -> int:
        """Returns the number of images that wait."""
        with self._changed:
            return sum(job.asked.n for job in self._jobs if not job.dropped.is_set())

    def add(self, job: Job) -> None:
        """Puts a job at the end of the queue; raises ``Full`` if too many images wait."""
        with self._changed:
            if self.waiting_locked() + job.asked.n > self.most_waiting:
                raise Full
            self._jobs.append(job)
            self._changed.notify()

    def waiting_locked(self) -> int:
        """Returns what ``waiting`` does, for callers that hold the lock; forgets jobs whose clients are gone."""
        self._jobs = collections.deque(job for job in self._jobs if not job.dropped.is_set())
        return sum(job.asked.n for job in self._jobs)

    def close(self, seconds: float = 60.0) -> None:
        """Ends the thread after the row that it draws; jobs that wait end with ``Gone``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                jobs = list(self._jobs) if self._closing else self._together()
                if self._closing:
                    self._jobs.clear()
            if self._closing:
                for job in jobs:
                    job.on_end(Gone())
                return
            try:
                self._draw(jobs)
            except Exception as error:  # the thread must outlive any request
                self.counts.failures += 1
                for job in jobs:
                    if not job.dropped.is_set():
                        job.on_end(error)

    def _together(self) -> list[Job]:
        """Takes the first job and all that fit to it, up to the config's batch size, out of the queue."""
        taken: list[Job] = []
        for job in list(self._jobs):
            size = sum(other.asked.n for other in taken) + job.asked.n
            if not taken or (job.fits == taken[0].fits and size <= self.pipeline.config.batch_size):
                taken.append(job)
                self._jobs.remove(job)
        return [job for job in taken if not job.dropped.is_set()]

    def _draw(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        start, first = time.perf_counter(), jobs[0].asked
        prompts = [job.asked.prompt for job in jobs for _ in range(job.asked.n)]
        seeds = np.concatenate([seeds_of(job.asked) for job in jobs])
        ways = 1 if self.pipeline.mesh is None else self.pipeline.mesh.shape["data"]
        size = ways << (-(-len(prompts) // ways) - 1).bit_length()  # few sizes, because each one is a program
        rows = np.resize(np.arange(len(prompts)), size)
        config = mixing(self.pipeline.config, first.arrag.weight, first.arrag.temperature)
        pipeline = dataclasses.replace(self.pipeline, config=config)
        drawn_here = [prompts[i] for i in rows]
        ends = np.cumsum([job.asked.n for job in jobs])
        parts: list[SampleOutput] = []
        length = placed(prompts, pipeline)
        for row in pipeline.rows(drawn_here, first.arrag.method, seeds[rows], length):
            parts.append(row)
            if self._closing or all(job.dropped.is_set() for job in jobs):
                self.counts.abandoned += 1
                break
            for job, end in zip(jobs, ends, strict=True):
                self._show(job, parts, slice(end - job.asked.n, end))
        else:
            whole = joined(parts)
            for job, end in zip(jobs, ends, strict=True):
                own: SampleOutput = jax.tree.map(lambda x, s=slice(end - job.asked.n, end): x[s], whole)
                if not job.dropped.is_set():
                    job.on_end((pipeline.pixels(np.asarray(own.codes)), own))
            self.counts.images += len(prompts)
        self.counts.batches += 1
        self.counts.seconds += time.perf_counter() - start

    def _show(self, job: Job, parts: Sequence[SampleOutput], own: slice) -> None:
        """Gives a job the partial picture that is due after this row."""
        due = shown_after(job.asked.partial_images, self.pipeline.model.grid[0])
        if len(parts) in due and not job.dropped.is_set():
            codes = np.concatenate([np.asarray(part.codes)[own] for part in parts], axis=1)
            images = np.concatenate([partial_images(self.pipeline.model, grid[None]) for grid in codes])
            job.on_partial(due.index(len(parts)), images)


def shown_after(partial: int, height: int) -> list[int]:
    """Returns the numbers of drawn rows after which a partial picture is shown; they are evenly spaced."""
    return [-(-height * (number + 1) // (partial + 1)) for number in range(partial)]
