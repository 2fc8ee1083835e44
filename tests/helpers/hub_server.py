"""A Hugging Face hub on loopback, as far as its client asks for: repositories with commits, and faults to order."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from arrag_jax import huggingface

LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".tar", ".arrayrecord")  # what git LFS keeps
Files = dict[str, bytes]


def files_below(folder: Path) -> Files:
    """The files of a folder as a commit."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub:
    """The repositories, and what has been asked.

    Attributes:
      commits: "OWNER/NAME" or "datasets/OWNER/NAME" → its commits, the last of which is "main".
      faults: start of a path → the status that every request for it gets.
      cut: name of a file → how many bytes of it are sent before the connection ends, once per entry.
      wrong: names of files that arrive with another content of the same length.
      asked: (method, path, range) of each request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[Files]] = {}
        self.faults: dict[str, int] = {}
        self.cut: dict[str, list[int]] = {}
        self.wrong: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self.address = ""

    def push(self, repo: str, files: Files) -> str:
        """Adds a commit to a repository; returns its hash."""
        self.commits.setdefault(repo, []).append(files)
        return self.commit(repo, len(self.commits[repo]) - 1)

    def commit(self, repo: str, number: int) -> str:
        """The hash of a commit."""
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision means."""
        named = {self.commit(repo, i): files for i, files in enumerate(self.commits[repo])}
        last = list(named)[-1]
        return next(((sha, named[sha]) for sha in [last if revision == "main" else revision] if sha in named), None)

    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        return {path.split("/resolve/")[1].partition("/")[2] for kind, path, _ in self.asked if "/resolve/" in path
                and kind == "GET"}  # fmt: skip


def digest(name: str, data: bytes) -> str:
    """How the hub names a file's content."""
    return (hashlib.sha256(data) if name.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # a list that the client reads for its own name in requests
            return self._send(404, b"{}")
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        fault = next((status for start, status in self.hub.faults.items() if path.startswith(start)), None)
        if fault is not None:
            return self._send(fault, b"{}", {"X-Error-Code": {403: "GatedRepo"}.get(fault, "")})
        api = path.startswith("/api/")
        words = path.removeprefix("/api").lstrip("/").removeprefix("models/").split("/")
        length = 3 if words[0] == "datasets" else 2
        repo, rest = "/".join(words[:length]), words[length:]
        if repo not in self.hub.commits:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        found = self.hub.at(repo, rest[1])
        if found is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        sha, files = found
        if api and rest[0] == "revision":
            return self._send(200, json.dumps({"id": repo.removeprefix("datasets/"), "sha": sha}).encode())
        if api:
            return self._send(200, json.dumps([_listed(name, data) for name, data in files.items()]).encode())
        return self._file("/".join(rest[2:]), sha, files, body)

    def _file(self, name: str, sha: str, files: Files, body: bool) -> None:
        data, first = files[name], 0
        headers = {"ETag": f'"{digest(name, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if body and name in self.hub.wrong:
            data = bytes(255 - x for x in data)
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(name, [])
        sent = cuts.pop(0) if body and cuts else None
        self._send(206 if first else 200, data[first:], headers, sent)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data if sent is None else data[:sent])
        if sent is not None:
            self.close_connection = True


def _listed(name: str, data: bytes) -> dict:
    listed = {"type": "file", "path": name, "size": len(data), "oid": digest(name, data)}
    if name.endswith(LARGE):
        listed["lfs"] = {"size": len(data), "oid": digest(name, data), "pointerSize": 130}
    return listed


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers on a free port of loopback; ``address`` is what HF_ENDPOINT must say."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attach(patch: pytest.MonkeyPatch, address: str, cache: Path, offline: bool = False) -> None:
    """Gives the client in this process what HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE give a new one."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    huggingface._looked_up.cache_clear()


def variables(address: str, cache: Path) -> dict[str, str]:
    """The environment of a process that uses the hub at an address."""
    return {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
