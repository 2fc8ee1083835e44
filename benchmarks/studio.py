"""Measures the studio: how long a visitor waits for a picture, and whether memory grows with the drawings.

python benchmarks/studio.py --store=demo/store [--drawings=50]

Starts ``arrag studio`` with the embedded checkpoint, asks for drawings as a browser does, another prompt and seed each
time, loads all pictures, and prints: seconds until the first rows and until both pictures of a drawing are there
(median and largest, after the first drawing, which compiles), and the resident memory of the process after a tenth, a
third, two thirds and all of the drawings.
"""

import functools
import logging
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import app, flags

from arrag_jax.figures.grids import table

STORE = flags.DEFINE_string("store", "demo/store", "datastore to draw with")
DRAWINGS = flags.DEFINE_integer("drawings", 50, "drawings, one after another", lower_bound=20)
METHOD = "gated+caption"
PROMPTS = ("a red octopus and a purple car", "a yellow dog", "two dogs", "a ball above a mushroom", "a green car")
SETTINGS = (0.98, 0.003, 256, 1.5, 1.0, 0.9)  # λ, τ, K, guidance, temperature, top-p
ENOUGH = 240  # seconds for the start


def main(argv):
    from gradio_client import Client

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [f"--store={STORE.value}", f"--port={port}", f"--method=plain,{METHOD}", "--noprogress"]
    process = subprocess.Popen([sys.executable, "-m", "arrag_jax.studio", *words])
    scratch = TemporaryDirectory()
    try:
        client = _connected(functools.partial(Client, download_files=scratch.name), process, f"http://127.0.0.1:{port}")
        first, whole, memory = [], [], []
        for seed in range(DRAWINGS.value):
            start, seen = time.perf_counter(), []
            asked = client.submit(PROMPTS[seed % len(PROMPTS)], METHOD, seed, *SETTINGS, api_name="/_draw")
            for _ in asked:
                seen.append(time.perf_counter() - start)
            if len(seen) < 3:
                sys.exit(f"error: no picture: {asked.result()}")
            first.append(seen[1])  # before it comes "Begins …"
            whole.append(seen[-1])
            memory.append(_resident(process.pid))
    finally:
        process.terminate()
        process.wait()
        scratch.cleanup()
    told_after = (DRAWINGS.value // 10, DRAWINGS.value // 3, 2 * DRAWINGS.value // 3, DRAWINGS.value)
    rows = [
        ["seconds to the first rows", float(np.median(first[1:])), max(first[1:])],
        ["seconds to both pictures", float(np.median(whole[1:])), max(whole[1:])],
    ]
    print(table(["after the first drawing", "median", "largest"], rows, digits=2))
    print(f"first drawing: {whole[0]:.1f} s")
    told = (f"{memory[number - 1]:,.0f} MiB after {number}" for number in told_after)
    print(f"resident memory: {', '.join(told)} drawings")


def _connected(client, process: subprocess.Popen, address: str):
    end = time.monotonic() + ENOUGH
    while time.monotonic() < end and process.poll() is None:
        try:
            return client(address, verbose=False)
        except Exception:  # whatever it raises while nobody listens yet
            time.sleep(0.5)
    sys.exit(f"error: no studio at {address}; see what it printed above")


def _resident(pid: int) -> float:
    """Returns a process's resident memory in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


if __name__ == "__main__":
    app.run(main)
