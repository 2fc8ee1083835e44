"""An S3 server on loopback: moto's, with dummy credentials."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrag_jax import object_storage

ABSENT = [name for name in ("moto", "flask", "s3fs") if importlib.util.find_spec(name) is None]
needs_storage = pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)} is not installed (requirements-dev.txt)")
BUCKET = "bucket"


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """Yields the environment of a process that uses the server; this process has it, too."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        client().mkdir(BUCKET)
        try:
            yield variables
        finally:
            server.stop()


def forget(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes this process what it is on another machine: it has another cache, and has listed nothing."""
    patch.setenv(object_storage.CACHE, str(folder))
    object_storage._listed_once.cache_clear()


def client():
    """The client of the server."""
    return object_storage.client("s3://")


def put(folder: Path, address: str) -> None:
    """Writes the files of a folder to an address."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client().put_file(str(path), f"{address}/{path.relative_to(folder).as_posix()}")


def content(address: str) -> dict[str, bytes]:
    """Name below an address → content."""
    start = len(address.removeprefix("s3://")) + 1
    return {path[start:]: client().cat_file(path) for path in client().find(address)}
