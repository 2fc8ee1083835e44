"""The ``curl`` examples of docs/studio.md, word for word, against the server whose command stands there."""

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig
from helpers import children, drawings

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "studio.md").read_text()
PORT = 8000  # the one of the examples

pytestmark = [pytest.mark.long, pytest.mark.slow]
pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra web)")


def test_the_examples_work_as_they_stand(tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another program listens on port {PORT}")
    blocks = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    examples = blocks.replace("\\\n", " ").splitlines()
    (command,) = re.findall(r"^python -m arrag_jax\.serve .*", PAGE, re.MULTILINE)
    (tmp_path / "arrag_jax" / "assets").mkdir(parents=True)
    (tmp_path / "arrag_jax" / "assets" / "emoji_janus").symlink_to(drawings.MODEL)
    data, keys = str(tmp_path / "data"), ("codebook", "hidden")
    images = DatastoreConfig(drawings.MODEL, "emoji_scenes/tiny", data_dir=data, num_images=24, keys=keys, indexes=())
    build_datastore.run(images, str(tmp_path / "demo" / "store"))
    words = [sys.executable, *shlex.split(command)[1:]]
    server = subprocess.Popen(words, cwd=tmp_path, env=children.alone(), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None and f"127.0.0.1:{PORT}" in server.stderr.readline()
        time.sleep(1)
        answers = [subprocess.run(shlex.split(x), capture_output=True, text=True, check=True).stdout for x in examples]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    plain, sourced, streamed, health, metrics = answers
    assert plain.count("b64_json") == 2 and '"share_copied"' in sourced
    kinds = re.findall("event: (.*)", streamed)
    assert kinds == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert '"ok"' in health and 'arrag_requests_total{status="200"} 3' in metrics
