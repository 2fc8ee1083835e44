"""An HTTP endpoint in the form of OpenAI's ``/v1/images/generations``, with partial images, health and metrics."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import jax
import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from arrag_jax.decode.loop import SampleOutput
from arrag_jax.errors import UserError, printable
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.evaluation.provenance import page_and_record
from arrag_jax.figures.canvas import RGBImage
from arrag_jax.web.requests import LIMITS, ImagesRequest, Limits, read_request
from arrag_jax.web.worker import Full, Gone, Images, Job, Worker

READ_SECONDS = 10.0  # a client has this long to send its request
POLL_SECONDS = 0.2  # how often a waiting request looks whether its client is still there


class Refused(Exception):
    """A request that gets an error of one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, " ".join(printable(line).split())


class Server:
    """The routes and what they share.

    Attributes:
      app: the ASGI application.
      worker: the thread that draws.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits = LIMITS):
        self.pipeline, self.limits = pipeline, limits
        self.worker = Worker(pipeline, limits.waiting)
        self.statuses: Counter[int] = Counter()
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self.app.add_api_route("/v1/images/generations", self.generations, methods=["POST"], response_model=None)
        self.app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        self.app.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        self.app.add_exception_handler(HTTPException, self._http_error)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.worker.close)

    async def _http_error(self, _: Request, error: Any) -> Response:
        return self._answer(error.status_code, f"{error.detail}; the routes are /v1/images/generations (POST), "
                            "/health and /metrics")  # fmt: skip

    def _answer(self, status: int, line: str) -> Response:
        self.statuses[status] += 1
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": line, "type": kind}}, status)

    async def health(self) -> Response:
        """Returns what is served, and whether the drawing thread runs."""
        alive, waiting = self.worker.alive, self.worker.waiting()
        known = {"methods": self.pipeline.methods, "size": "{1}x{0}".format(*self.pipeline.model.image_size)}
        return JSONResponse({"status": "ok" if alive else "failed", "waiting": waiting, **known}, 200 if alive else 503)

    async def metrics(self) -> Response:
        """Returns counts in the text form that Prometheus reads."""
        lines = [f'arrag_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.statuses.items())]
        for name, value in dataclasses.asdict(self.worker.counts).items():
            lines.append(f"arrag_drawing_{name}_total {value}")
        lines.append(f"arrag_waiting_images {self.worker.waiting()}")
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def generations(self, request: Request) -> Response:
        """Draws the images of a request; an error is one line of JSON."""
        try:
            asked = await self._read(request)
            ends: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
            job = self._job(asked, ends)
            try:
                self.worker.add(job)
            except Full:
                raise Refused(429, f"more than {self.limits.waiting} images would wait; ask again later") from None
            if asked.stream:
                self.statuses[200] += 1
                return StreamingResponse(self._events(job, ends), media_type="text/event-stream")
            try:
                images, drawn = await self._end(request, ends)
            finally:
                job.dropped.set()
            data = await asyncio.to_thread(self._data, asked, images, drawn)
            self.statuses[200] += 1
            return JSONResponse({"created": int(time.time()), "data": data})
        except Refused as error:
            return self._answer(error.status, error.line)

    async def _read(self, request: Request) -> ImagesRequest:
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > self.limits.body:
                    raise Refused(413, f"the body is larger than {self.limits.body:,} bytes")

        try:
            await asyncio.wait_for(read(), READ_SECONDS)
            return read_request(bytes(body), self.limits, self.pipeline)
        except ClientDisconnect:
            raise Refused(499, "the client went away") from None
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {READ_SECONDS:.0f} s") from None
        except UserError as error:
            raise Refused(400, str(error)) from None

    def _job(self, asked: ImagesRequest, ends: "asyncio.Queue[tuple[str, Any]]") -> Job:
        """Returns a job whose results arrive in the queue; the drawing thread calls it."""
        loop = asyncio.get_running_loop()

        def put(kind: str, what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ends.put_nowait, (kind, what))

        return Job(asked, lambda number, images: put("partial", (number, images)), lambda end: put("end", end))

    async def _end(self, request: Request, ends: "asyncio.Queue[tuple[str, Any]]") -> tuple[Images, SampleOutput]:
        """Returns the finished images, unless the client goes away."""
        while True:
            try:
                _, end = await asyncio.wait_for(ends.get(), POLL_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "the client went away") from None
                continue
            return _checked(end)

    async def _events(self, job: Job, ends: "asyncio.Queue[tuple[str, Any]]") -> AsyncIterator[str]:
        """Yields server-sent events; it is closed when the client goes away."""
        try:
            while True:
                kind, what = await ends.get()
                if kind == "partial":
                    number, images = what
                    for index, image in enumerate(images):
                        about = {"partial_image_index": number, "index": index, "b64_json": encoded(image)}
                        yield _event("image_generation.partial_image", about)
                    continue
                try:
                    data = await asyncio.to_thread(self._data, job.asked, *_checked(what))
                except Refused as error:
                    yield _event("error", {"error": {"message": error.line, "type": "server_error"}})
                    return
                for index, image_data in enumerate(data):
                    yield _event("image_generation.completed", {"index": index, **image_data})
                return
        finally:
            job.dropped.set()

    def _data(self, asked: ImagesRequest, images: Images, drawn: SampleOutput) -> list[dict[str, Any]]:
        """Returns the items of a response."""
        data: list[dict[str, Any]] = []
        for number, image in enumerate(images):
            item: dict[str, Any] = {"b64_json": encoded(image), "seed": asked.seed + number}
            item["arrag"] = {"method": asked.arrag.method}
            if asked.arrag.provenance and self.pipeline.policy(asked.arrag.method).uses_retrieval:
                own = jax.tree.map(lambda x, number=number: x[number], drawn)
                record = page_and_record(self.pipeline, asked.arrag.method, asked.prompt, image, own)[1]
                item["arrag"] |= {key: record[key] for key in (*SHARES, "nearest_in_place", "sources")}
            data.append(item)
        return data


SHARES = ("share_retrieved", "share_among_neighbors", "share_common", "share_copied", "share_largest_copy")


def _checked(end: Any) -> tuple[Images, SampleOutput]:
    """Returns images and output; raises Refused if the end of a job is an error."""
    if isinstance(end, UserError):
        raise Refused(400, str(end))
    if isinstance(end, Gone):
        raise Refused(503, "the server stops")
    if isinstance(end, Exception):
        raise Refused(500, f"drawing failed: {type(end).__name__}")
    return end


def _event(kind: str, about: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **about})}\n\n"


def encoded(image: RGBImage) -> str:
    """Returns an image as base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
