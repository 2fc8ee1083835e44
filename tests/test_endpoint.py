"""Laws of ``arrag serve``: what it draws, what it refuses, and that no client breaks it."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import socket
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from arrag_jax.config import DrawConfig, RetrievalConfig, SamplingConfig
from arrag_jax.decode.loop import sample
from arrag_jax.errors import UserError
from arrag_jax.evaluation.pipeline import Pipeline
from arrag_jax.web.requests import Limits
from arrag_jax.web.worker import shown_after
from helpers import tiny

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from arrag_jax.web.endpoint import Server  # noqa: E402

LIMITS = Limits(images=4, prompt=100, body=1000, waiting=8)


class Text:
    """A prompt encoder of three tokens."""

    def length(self, prompts):
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("a prompt is empty; say what to draw")
        return 3

    def __call__(self, prompts, length=None):
        ids = [np.random.default_rng(zlib.crc32(prompt.encode())).integers(2, 12, 3) for prompt in prompts]
        return np.array(ids, np.int32), np.ones((len(prompts), 3), bool)


@pytest.fixture(scope="module")
def pipeline():
    config = DrawConfig("tiny", RetrievalConfig(store=""), sampling=SamplingConfig(2.0, top_p=0.9), batch_size=4)
    return Pipeline(config, ("plain",), tiny.janus(), {}, Text(), {})


class Running:
    """A server on a port of its own."""

    def __init__(self, pipeline: Pipeline, limits: Limits):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.server = Server(pipeline, limits)
        config = uvicorn.Config(self.server.app, port=self.port, log_level="critical", timeout_graceful_shutdown=5)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def ask(self, method: str = "POST", path: str = "/v1/images/generations", body=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, text)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def drop(self, body: dict, half: bool) -> None:
        """Sends a request, or half of one, and goes away."""
        text = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head + (text[: len(text) // 2] if half else text))

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive() and not self.server.worker.alive


@pytest.fixture(scope="module")
def server(pipeline):
    running = Running(pipeline, LIMITS)
    yield running
    running.stop()


def pictures(data: list[dict]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))) for item in data]


def expected(pipeline: Pipeline, prompt: str, seeds) -> np.ndarray:
    ids, mask = pipeline.text([prompt] * len(seeds))
    drawn = sample(pipeline.model, ids, cfg_scale=2.0, top_p=0.9, seed=np.asarray(seeds), prompt_mask=mask)
    return pipeline.pixels(np.asarray(drawn.codes))


def events(text: bytes) -> list[dict]:
    return [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]


@pytest.mark.slow
def test_it_draws_what_sample_draws(server, pipeline):
    status, body = server.ask(body={"prompt": "a cat", "n": 3, "seed": 7, "size": "auto", "model": "any"})
    answer = json.loads(body)
    assert status == 200 and [item["seed"] for item in answer["data"]] == [7, 8, 9]
    np.testing.assert_array_equal(pictures(answer["data"]), expected(pipeline, "a cat", [7, 8, 9]))


def test_partial_pictures_come_before_the_whole_one(server, pipeline):
    status, body = server.ask(body={"prompt": "a cat", "seed": 7, "stream": True, "partial_images": 3})
    told = events(body)
    assert status == 200
    assert [event["type"].rpartition(".")[2] for event in told] == [*["partial_image"] * 3, "completed"]
    assert [event["partial_image_index"] for event in told[:3]] == [0, 1, 2]
    whole = expected(pipeline, "a cat", [7])[0]
    *partial, last = pictures(told)
    np.testing.assert_array_equal(last, whole)
    rows = [part.shape[0] * (number + 1) // 4 for number, part in enumerate(partial)]
    drawn = [np.abs(part[:row].astype(int) - whole[:row]).mean() for part, row in zip(partial, rows, strict=True)]
    assert all(np.ptp(part[row:]) == 0 for part, row in zip(partial, rows, strict=True)) and max(drawn) < 64


@pytest.mark.parametrize(("partial", "rows"), [(0, []), (1, [6]), (2, [4, 8]), (11, list(range(1, 12)))])
def test_partial_pictures_are_evenly_spaced(partial, rows):
    assert shown_after(partial, 12) == rows


def test_requests_that_wait_are_drawn_together_as_if_alone(server, pipeline):
    before = server.server.worker.counts.batches
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, body={"prompt": f"cat {i}", "seed": i}) for i in range(8)]
        answers = [future.result() for future in asked]
    for i, (status, body) in enumerate(answers):
        assert status == 200
        np.testing.assert_array_equal(pictures(json.loads(body)["data"]), expected(pipeline, f"cat {i}", [i]))
    assert server.server.worker.counts.batches - before < 8


BAD = {
    b"": "not JSON",
    b"[1]": "must hold keys",
    b"\xff": "not JSON",
    b"{" * 900: "nested too deeply",
    b'{"prompt": "a", "prompt2": 1}': "unknown key",
    b"{}": "prompt",
    b'{"prompt": ""}': "empty",
    b'{"prompt": 3}': "prompt",
    b'{"prompt": "a", "n": 0}': r"n=0",
    b'{"prompt": "a", "n": 5}': r"n=5",
    b'{"prompt": "a", "n": 1e99}': "n",
    b'{"prompt": "a", "n": NaN}': "not JSON",
    b'{"prompt": "a", "seed": -1}': "seed=-1",
    b'{"prompt": "a", "seed": 4294967296}': "seed",
    b'{"prompt": "a", "size": "1024x1024"}': "size",
    b'{"prompt": "a", "response_format": "url"}': "response_format",
    b'{"prompt": "a", "partial_images": 2}': "stream",
    b'{"prompt": "a", "stream": true, "partial_images": 40}': "partial_images",
    b'{"prompt": "a", "arrag": {"method": "magic"}}': "magic",
    b'{"prompt": "a", "arrag": {"weight": 2}}': "weight",
    b'{"prompt": "a", "arrag": {"temperature": 0}}': "temperature",
    b'{"prompt": "a\\u0000\\nb' + b"c" * 200 + b'"}': "characters",
}


@pytest.mark.parametrize("body", BAD, ids=lambda body: body[:24].decode("ascii", "replace"))
def test_a_bad_request_gets_one_line(server, body):
    status, answer = server.ask(body=body)
    message = json.loads(answer)["error"]["message"]
    assert status == 400 and BAD[body] in message and "\n" not in message and len(message) < 1200


def test_bodies_routes_and_methods_have_limits(server):
    assert server.ask(body=b'{"prompt": "' + b"a" * 2000 + b'"}')[0] == 413
    assert server.ask(path="/v1/models", body={})[0] == 404
    assert server.ask("GET")[0] == 405
    for body in (server.ask(path="/v1/models", body={})[1], server.ask("GET")[1]):
        assert "/v1/images/generations" in json.loads(body)["error"]["message"]


@pytest.mark.slow
def test_a_full_queue_refuses(pipeline):
    running = Running(pipeline, Limits(images=2, waiting=1))
    try:
        status, body = running.ask(body={"prompt": "a", "n": 2})
        assert status == 429 and "ask again later" in json.loads(body)["error"]["message"]
        assert running.ask(body={"prompt": "a"})[0] == 200
    finally:
        running.stop()


@pytest.mark.slow
def test_no_client_breaks_it_or_makes_it_leak(server):
    """200 requests: good ones, bad ones, and clients that go away before and after their request has arrived."""
    bad, good = list(BAD), {"prompt": "a dog", "seed": 1}

    def one(i: int) -> int:
        kind = i % 5
        if kind == 0:
            return server.ask(body=bad[i // 5 % len(bad)])[0] == 400
        if kind == 1:
            server.drop({**good, "n": 4, "stream": i % 2 == 0}, half=i % 10 == 1)
            return True
        return server.ask(body={**good, "stream": kind == 2})[0] in (200, 429)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(20)))
        held = len(os.listdir("/proc/self/fd")), threading.active_count()
        assert all(pool.map(one, range(20, 200)))
    worker, end = server.server.worker, time.monotonic() + 60
    while worker.waiting() and time.monotonic() < end:
        time.sleep(0.05)
    status, body = server.ask("GET", "/health")
    assert status == 200 and json.loads(body)["status"] == "ok" and json.loads(body)["waiting"] == 0
    metrics = server.ask("GET", "/metrics")[1].decode()
    assert "arrag_drawing_failures_total 0" in metrics and 'arrag_requests_total{status="200"}' in metrics
    assert len(os.listdir("/proc/self/fd")) <= held[0] + 10 and threading.active_count() <= held[1] + 10
    assert server.ask(body=good)[0] == 200
